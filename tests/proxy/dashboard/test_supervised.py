from __future__ import annotations

import json
import os
from pathlib import Path

from pdserve.proxy.dashboard.supervised import Supervised


def test_restarts_come_from_the_launchers_file(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    told = Supervised(str(file))
    told.look()
    assert told.processes == {}
    file.write_text(
        json.dumps({"name": "d", "pid": 7, "processes": [{"name": "decode-0", "restarts": 2, "state": "ready"}]})
    )
    told.look()
    assert told.deployment == "d"
    assert told.processes["decode-0"].restarts == 2


def test_what_was_known_outlives_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    file.write_text('{"name": "d", "processes": [{"name": "decode-0", "restarts": 2}]}')
    told = Supervised(str(file))
    told.look()
    for content in ("{", '{"processes": 3}'):
        file.write_text(content)
        os.utime(file, ns=(len(content), len(content)))
        told.look()
        assert told.processes["decode-0"].restarts == 2


def test_without_a_file_nothing_is_known() -> None:
    told = Supervised("")
    told.look()
    assert (told.deployment, told.processes) == ("", {})


def test_it_reads_what_the_launcher_writes(tmp_path: Path) -> None:
    from pdserve.deploy import state

    record = state.ProcessRecord(
        "decode-0", "decode", "", "", "", state="restarting", detail="again in 4 s", restarts=3
    )
    state.write(state.Deployment("d", str(tmp_path), "", "m", "", 1, 0.0, 0.0, processes=[record]))
    told = Supervised(str(tmp_path / state.FILE))
    told.look()
    found = told.processes["decode-0"]
    assert (found.state, found.detail, found.restarts) == ("restarting", "again in 4 s", 3)

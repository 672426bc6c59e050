"""The timed walk of a newcomer: what it writes and asks, without the minutes that the walk itself takes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pdserve import topology

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def newcomer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("newcomer", ROOT / "scripts" / "newcomer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["newcomer"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_shipped_topology_on_other_ports(newcomer: ModuleType, tmp_path: Path) -> None:
    assert newcomer.with_ports(ROOT, tmp_path, 8000) == topology.shipped_topologies()["local-cpu"]
    made = topology.load(newcomer.with_ports(ROOT, tmp_path, 24200))
    shipped = topology.load("local-cpu")
    assert made.name == "newcomer"
    assert made.proxy is not None
    assert made.cache is not None
    assert (made.proxy.port, made.cache.admin_port, *(i.port for i in made.instances)) == (24200, 24201, 24202, 24203)
    assert [i.engine for i in made.instances] == [i.engine for i in shipped.instances]


def test_a_home_of_its_own(newcomer: ModuleType, tmp_path: Path) -> None:
    made = newcomer.environment(tmp_path, pip_cache=False)
    for name in ("PDSERVE_HOME", "PDSERVE_RUN_DIR", "PIP_CACHE_DIR"):
        assert made[name].startswith(str(tmp_path))


def test_a_step_that_fails_is_told_with_its_last_words(newcomer: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(newcomer.Failed, match="ended with code 3: as planned"):
        newcomer.run(["sh", "-c", "echo as planned >&2; exit 3"], tmp_path, 30)
    with pytest.raises(newcomer.Failed, match="took more than"):
        newcomer.run(["sleep", "30"], tmp_path, 0.2)
    with pytest.raises(newcomer.Failed, match=r"http://127\.0\.0\.1:1/"):
        newcomer.fetch("http://127.0.0.1:1/dashboard")

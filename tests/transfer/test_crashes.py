"""A hundred schedules of kills and recoveries, the same ones each time; thousands by chance with `make soak`."""

import subprocess
import sys
from pathlib import Path


def test_kills_at_random_points_leave_no_wrong_byte_no_lost_chunk_and_no_lost_space():
    # A process of its own, because it forks: a child of pytest's would inherit its threads' locks.
    script = Path(__file__).with_name("crashes.py")
    run = subprocess.run(
        [sys.executable, str(script), "--schedules", "100", "--seed", "20261122"],
        env={"PDSERVE_LOG_LEVEL": "error", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "100 schedules" in run.stdout

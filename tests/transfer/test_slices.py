"""The daemon's slice of processor time: asked for, and held by every thread that comes after."""

import os
import subprocess
import sys

import pytest

from pdserve.transfer import slices

SAYS = """
import os, threading
from pathlib import Path
from pdserve.transfer import slices

def of(task):
    return next((line.split(":")[1].strip() for line in Path(f"/proc/self/task/{task}/sched").read_text().splitlines()
                 if line.startswith("se.slice")), "?")

before = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)
took = slices.shorten()
same = before == (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0))
found = []
thread = threading.Thread(target=lambda: found.append(of(threading.get_native_id())))
thread.start()
thread.join(60)
print(took, same, of(os.getpid()), found[0])
"""


def say(*before):
    words = [*before, sys.executable, "-P", "-c", SAYS]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.split()


def test_threads_that_come_later_have_the_same_slice_and_nothing_else_changes():
    if not os.path.exists("/proc/self/sched"):
        pytest.skip("this kernel does not show how it schedules a thread (/proc/PID/sched)")
    took, same, mine, its = say()
    assert same == "True"
    assert mine == its
    assert (took == "True") == (mine == "100000")


def test_another_policy_is_left_alone():
    took, same, *_ = say("chrt", "--batch", "0")
    assert (took, same) == ("False", "True")


def test_an_unknown_machine_is_no_error(monkeypatch):
    monkeypatch.setattr(slices.platform, "machine", lambda: "pdp11")
    assert slices.shorten() is False

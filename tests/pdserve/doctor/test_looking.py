"""The doctor's eyes and hands: checks against real things, the runner against checks that hang or break, the report."""

from __future__ import annotations

import errno
import http.server
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from pdserve import __main__ as command
from pdserve.doctor import child, gpu, memory, network, probe_cuda, registry, report, runner, storage, subject
from pdserve.doctor.finding import Finding, fail, ok, warn
from pdserve.doctor.runner import Check
from pdserve.doctor.subject import Subject
from pdserve.errors import ConfigError, NotRunning
from pdserve.transfer import arena


def test_a_hanging_and_a_broken_check_hide_nothing() -> None:
    never = threading.Event()

    def hangs(_: Subject) -> Iterator[Finding]:
        never.wait(60)
        yield ok("hangs", "")

    def breaks(_: Subject) -> Iterator[Finding]:
        yield ok("breaks", "first")
        raise ValueError("second")

    def works(_: Subject) -> Iterator[Finding]:
        yield ok("works", "fine")

    checks = [
        Check("hangs", hangs, 0.2),
        Check("breaks", breaks),
        Check("works", works),
        Check("last", works, alone=True),
    ]
    told: list[tuple[str, int]] = []
    found = runner.run(checks, Subject(), lambda doing, done: told.append((doing, done)))
    never.set()
    assert [f.check for f in found] == ["hangs", "breaks", "works", "works"]
    assert "no result in time (0.2 s)" in found[0].found
    assert "ValueError: second" in found[1].found
    assert [f.status for f in found] == ["warn", "warn", "ok", "ok"]
    assert ("last", 3) in told
    assert told[-1] == ("", 4)


def test_every_check_has_a_name_of_its_own_and_a_deadline() -> None:
    names = [check.name for check in registry.CHECKS]
    assert len(set(names)) == len(names)
    assert all(0 < check.deadline <= 180 for check in registry.CHECKS)


def test_checks_of_this_machine_say_something_true() -> None:
    quick = [check for check in registry.CHECKS if check.name not in ("vllm", "kernels")]
    found = runner.run(quick, Subject())
    by_name = {f.check: f for f in found}
    assert {"gpu", "cores", "memory", "shared memory", "leftovers", "memory lock", "numa", "ucx", "disk"} <= set(
        by_name
    )
    assert by_name["cores"].found == f"{len(os.sched_getaffinity(0))} usable"
    assert not [f for f in found if "the check itself failed" in f.found]


def test_huge_pages_are_tried_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = memory.huge_pages(Subject())
    assert found.status == "ok"
    assert ("given to the arena" in found.found) == (arena.huge_page_trial() == 0)

    def full() -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(arena, "huge_page_trial", full)
    (found,) = memory.huge_pages(Subject())
    assert (found.status, found.check) == ("skip", memory.HUGE)
    assert "No space left" in found.found


def test_the_driver_is_asked_in_a_child() -> None:
    assert child.ask("pdserve.doctor.probe_cuda", seconds=60) == probe_cuda.look()


DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return FAIL; }
int cuGetErrorName(int code, const char **name) { *name = "CUDA_ERROR_NO_DEVICE"; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Pretended GPU", size); return 0; }
int cuDeviceTotalMem_v2(size_t *size, int device) { *size = 80ull << 30; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = which == 75 ? 9 : which == 76 ? 0 : -1; return 0; }
"""


@pytest.mark.parametrize("fail", [0, 100])
def test_a_driver_is_read_through_its_library(fail: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver of our own making: the calls, the types and the units are those of the real one."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a driver with")
    source = tmp_path / "cuda.c"
    source.write_text(DRIVER.replace("FAIL", str(fail)))
    made = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(made), str(source)], check=True, timeout=60)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    facts = gpu.look()
    if fail:
        assert facts.cuda["error"] == "CUDA_ERROR_NO_DEVICE"
        assert facts.cuda["devices"] == []
        return
    assert facts.cuda["driver"] == "13.0"
    assert facts.cuda["devices"] == [{"name": "Pretended GPU", "bytes": 80 << 30, "arch": "sm_90"}] * 2
    assert "2 x Pretended GPU (80 GiB, sm_90)" in gpu.judge(facts, 2).found
    assert gpu.judge(facts, 3).status == "fail"


def test_a_child_that_hangs_or_fails_is_an_answer() -> None:
    with pytest.raises(child.ChildError, match=r"no answer within 0\.2 s"):
        child.output(["sleep", "20"], 0.2)
    with pytest.raises(child.ChildError, match="code 3: it is so"):
        child.output(["sh", "-c", "echo it is so >&2; exit 3"], 20)
    with pytest.raises(child.ChildError, match="cannot be run: No such file"):
        child.output(["/no/such/program"], 5)


TOKEN = {"PDSERVE_ADMIN_TOKEN": "a token of the test"}


def test_who_listens_and_whether_it_is_ours() -> None:
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", 0))
        mine.listen()
        port = mine.getsockname()[1]
        assert network.stranger(port, {os.getsid(0)}) is None
        other = {os.getsid(0) + 1}  # no number for granted: ours may be 0 or 1 in a container
        assert network.stranger(port, other) == os.getpid()
    assert network.stranger(port, other) is None


class _Clock(http.server.BaseHTTPRequestHandler):
    ahead = 0.0

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(time.time() + self.ahead, usegmt=True)

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing on the test's stderr."""


@pytest.mark.parametrize(("ahead", "status"), [(0.0, "ok"), (10.0, "warn"), (-4000.0, "fail")])
def test_a_clock_is_read_off_an_answer(ahead: float, status: str) -> None:
    handler = type("Handler", (_Clock,), {"ahead": ahead})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            clock = network.read_clock(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join(60)
    assert clock.error == ""
    assert clock.ahead == pytest.approx(ahead, abs=3.0)
    assert network.judge_clocks([clock]).status == status
    assert network.read_clock(f"http://127.0.0.1:{server.server_port}").error


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    speed = storage.measure(tmp_path)
    assert speed.write > 0
    assert speed.read > 0
    assert list(tmp_path.iterdir()) == []


def test_tiers_are_tried_with_a_chunk(tmp_path: Path) -> None:
    assert storage.probe_tier("memory:", "cache.tiers[0]").status == "ok"
    found = storage.probe_tier(f"file://{tmp_path}", "cache.tiers[0]")
    assert (found.status, found.check) == ("ok", "tier file")
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and f.stat().st_size > 4096]
    found = storage.probe_tier("file:///no/such/folder", "cache.tiers[0]")
    assert found.status == "fail"
    assert "Make or mount it first" in found.fix


def test_a_tier_that_is_down_is_named_without_its_password() -> None:
    pytest.importorskip("redis", reason="the redis client library is not installed")
    found = storage.probe_tier("redis://me:hunter2@127.0.0.1:1/0", "cache.tiers[1]")
    assert found.status == "fail"
    assert "redis://...@127.0.0.1:1/0" in found.found
    assert "Start that server, or correct cache.tiers[1]" in found.fix
    assert "hunter2" not in f"{found}"


def test_a_daemon_is_asked_with_its_token(
    tmp_path: Path, start_cache: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"doctor-{os.getpid()}"
    running = start_cache(tmp_path, name, 64 << 20, "--disk", str(tmp_path / "kv"), "--disk-size", "64MiB", env=TOKEN)
    url = f"http://127.0.0.1:{running.port}"
    checks = [check for check in registry.CHECKS if check.name in ("cache", "clocks")]
    examined = subject.find(url)
    assert examined.daemon == url
    found = {f.check: f for f in runner.run(checks, examined)}
    assert found["clocks"].status == "ok"
    assert found["cache"].status == "warn"
    assert "PDSERVE_ADMIN_TOKEN" in found["cache"].fix
    monkeypatch.setenv("PDSERVE_ADMIN_TOKEN", TOKEN["PDSERVE_ADMIN_TOKEN"])
    found = {f.check: f for f in runner.run(checks, examined)}
    assert (found["cache"].status, found["cache disk"].status) == ("ok", "ok")
    running.stop()
    assert {f.check: f.status for f in runner.run(checks, examined)}["cache"] == "fail"


def test_what_a_name_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_RUN_DIR", str(tmp_path))
    assert subject.find(None).topology is None
    given = subject.find("local-cpu")
    assert given.topology is not None
    assert given.topology.name == "local-cpu"
    assert given.running is None
    with pytest.raises(NotRunning, match=r"nothing answers at http://127\.0\.0\.1:1/health"):
        subject.find("http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="no such topology"):
        subject.find("absent.yaml")
    file = tmp_path / "t.yaml"
    file.write_text("name: t\nmodel: ./absent\nboth: [{port: 24090}]\ncache: {size: 64MiB}\n")
    problem = subject.find(str(file)).problem
    assert problem is not None
    assert problem.key == "model"


def test_prompts_that_never_share(tmp_path: Path) -> None:
    file = tmp_path / "sent.jsonl"
    rules = "You are a careful assistant of a large library. " * 40
    texts = [f"It is 2026-11-22 10:0{n}. {rules} Question {n}?" for n in range(3)]
    bodies = [{"messages": [{"role": "system", "content": text}]} for text in texts]
    file.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    (check,) = [check for check in registry.CHECKS if check.name == "prompts"]
    found = runner.run([check], Subject(prompts=file))
    assert [f.status for f in found] == ["warn"]
    assert "timestamp: 2 times" in found[0].found
    assert "Put the time behind" in found[0].fix
    file.write_text(json.dumps(bodies[0]) + "\n")
    assert [f.status for f in runner.run([check], Subject(prompts=file))] == ["ok"]
    assert runner.run([check], Subject()) == []


HOSTS = """
name: two
model: Qwen/Qwen3-8B
hosts: [{name: a, address: 192.0.2.1}, {name: b, address: 192.0.2.2}]
engine: {kind: fake, device: cpu}
prefill: [{port: 24091, host: a}]
decode: [{port: 24092, host: b}]
cache: {size: 64MiB, admin_port: 24093}
proxy: {port: 24094}
"""


def test_one_part_of_several_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_RUN_DIR", str(tmp_path))
    file = tmp_path / "two.yaml"
    file.write_text(HOSTS)
    with pytest.raises(ConfigError, match="--host"):
        subject.find(str(file))
    examined = subject.find(str(file), host="a")
    checks = [check for check in registry.CHECKS if check.name in ("hosts", "ports")]
    everything = runner.run(checks, examined)
    found = {f.check: f for f in everything}
    ports = " ".join(f.found for f in everything if f.check == "ports")
    assert "24091" in ports
    assert "24092" not in ports
    assert found["host b"].status == "warn"
    assert "pdserve launch ... --host b" in found["host b"].fix


FINDINGS = [
    ok("gpu", "no GPU"),
    warn("disk", "x" * 200, "It is slow. " * 12, "Buy another one."),
    fail("ports", "8000 is in use", "The proxy could not listen.", "Stop that program."),
]


def test_the_report_fits_80_columns_and_names_the_fix(capsys: pytest.CaptureFixture[str]) -> None:
    report.show("this machine", FINDINGS)
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "fix: Buy another one." in out
    assert out.rstrip().endswith("1 ok, 1 warn, 1 fail")
    report.show("this machine", FINDINGS, quiet=True)
    assert "no GPU" not in capsys.readouterr().out


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PDSERVE_RUN_DIR", str(tmp_path))
    assert command.main(["doctor", "--only", "cores", "--only", "numa", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [f["check"] for f in answer["findings"]] == ["cores", "numa"]
    assert (answer["status"], answer["exit_code"]) == ("ok", 0)
    assert command.main(["doctor", "--only", "nonsense"]) == 2
    assert "Known: gpu, vllm" in capsys.readouterr().err
    assert command.main(["doctor", "http://127.0.0.1:1"]) == 3
    assert command.main(["doctor", "--prompts", "absent.jsonl"]) == 2
    assert command.main(["doctor", "gpu-1p1d", "--only", "gpu"]) in (0, 1)

"""Ten setups that do not work: what the user sees, and that it names the fix. docs/troubleshooting.md shows the same words.

Everything but the engine without memory runs with fake engines, as `pdserve` commands, in a home and ports of its own.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from ports import free_port

from pdserve.deploy.backends.local import kill_all, marked

DOCS = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"
FAKE = """
name: NAME
model: MODEL
engine: {kind: fake, device: cpu}
prefill: [{port: PORT0}]
decode: [{port: PORT1}]
cache: {size: 64MiB, admin_port: PORT2}
proxy: {port: PORT3}
"""
REAL = FAKE.replace(
    "kind: fake, device: cpu", "device: cpu, dtype: bfloat16, max_model_len: 512, kv_cache_space_gib: 1"
)
SECONDS = 240.0


class User:
    """Types `pdserve ...` with a home and run directory of their own."""

    def __init__(self, folder: Path, runs: Path) -> None:
        self.folder, self.runs, self.name = folder, runs, f"broken-{os.getpid()}"
        self.env = {**os.environ, "PDSERVE_RUN_DIR": str(runs), "COLUMNS": "80"}
        self.ports = [free_port() for _ in range(4)]

    def file(self, text: str = FAKE, model: str = "") -> str:
        for n, port in enumerate(self.ports):
            text = text.replace(f"PORT{n}", str(port))
        if not model:
            made = self.folder / "model"
            made.mkdir(exist_ok=True)
            (made / "config.json").write_text("{}")
            model = str(made)
        path = self.folder / "t.yaml"
        path.write_text(text.replace("NAME", self.name).replace("MODEL", model))
        return str(path)

    def types(self, *words: str, seconds: float = SECONDS, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "pdserve", *words]
        environment = {**self.env, **more}
        return subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=seconds, check=False
        )

    def finding(self, check: str, *words: str, label: str = "", **more: str) -> dict[str, str]:
        """What the doctor says on one point."""
        done = self.types("doctor", *words, "--only", check, "--json", **more)
        assert done.stdout, done.stderr
        found: list[dict[str, str]] = json.loads(done.stdout)["findings"]
        return next(f for f in found if f["check"].startswith(label or check))


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    with tempfile.TemporaryDirectory(prefix="pds-") as runs:  # pytest's folders are too long for a unix socket
        made = User(tmp_path, Path(runs) / "r")
        yield made
        if made.runs.exists():
            made.types("stop", "--all")
        left = marked(str(made.runs / made.name))
        kill_all(left)
    assert not left, "processes outlived the test"
    assert not Path(f"/dev/shm/pdserve-{made.name}.arena").exists()


def says(text: str, *words: str) -> None:
    """The words are there (however the lines were folded), and the page for people in trouble shows them too."""
    flat, page = " ".join(text.split()), " ".join(DOCS.read_text().split())
    for word in words:
        assert word in flat, f"{word!r} is not in: {text}"
        assert word in page, f"docs/troubleshooting.md does not show {word!r}"


def refused(user: User, *words: str, **more: str) -> str:
    """The command ends with code 2 and one line, and nothing was started."""
    done = user.types(*words, **more)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not marked(str(user.runs / user.name))
    return done.stderr


def test_1_wrong_model_path(user: User) -> None:
    said = refused(user, "launch", user.file(model="./absent"))
    says(
        said,
        "model: './absent' is neither a folder",
        "Give a folder with config.json and the weights, a hub id, or demo.",
    )
    assert user.finding("model", user.file(model="./absent"))["status"] == "fail"


def test_2_port_taken(user: User) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", user.ports[0]))
        taken.listen()
        said = refused(user, "launch", user.file())
        says(said, "cannot be used: Address already in use (pid", "Stop that program, or choose another port.")
        assert f"prefill[0].port: {user.ports[0]}" in said
        found = user.finding("ports", user.file())
    assert found["status"] == "fail"
    assert "Stop that program, or give prefill[0].port another number." in found["fix"]


def test_3a_too_little_memory_is_seen_before_the_start(user: User) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    text = REAL.replace("kv_cache_space_gib: 1", "kv_cache_space_gib: 4000")
    said = refused(user, "launch", user.file(text))
    says(said, "of memory are needed", "Lower cache.size or kv_cache_space_gib, run fewer engines")


def test_4_vllm_too_old(user: User) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    old = user.folder / "old" / "vllm-0.25.1.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.25.1\n")
    said = refused(user, "launch", user.file(REAL), PYTHONPATH=str(old.parent))
    says(said, "vLLM 0.25.1 is outside the supported range", "pip install 'pdserve[vllm]' (CUDA) or 'pdserve[cpu]'")
    found = user.finding("vllm", user.file(REAL), PYTHONPATH=str(old.parent))
    assert (found["status"], "Install one in the range" in found["fix"]) == ("fail", True)


def test_5_shared_memory_too_small(user: User) -> None:
    said = refused(user, "launch", user.file(FAKE.replace("64MiB", "900TiB")))
    says(said, "does not fit in /dev/shm, which has", "Make it smaller, or enlarge /dev/shm: mount -o remount,size=")
    found = user.finding("shared memory", user.file(FAKE.replace("64MiB", "900TiB")))
    assert (found["status"], "--shm-size" in found["fix"]) == ("fail", True)


def test_6_disk_cap_of_zero(user: User) -> None:
    said = refused(user, "launch", user.file(FAKE.replace("size: 64MiB,", "size: 64MiB, disk: {size: 0},")))
    says(said, "cache.disk.size: 0 bytes is too small to be of use. Give at least 64MiB.")


def test_7_redis_down(user: User) -> None:
    pytest.importorskip("redis", reason="the redis client library is not installed")
    port = free_port()
    text = FAKE.replace("size: 64MiB,", f"size: 64MiB, tiers: ['redis://:hunter2@127.0.0.1:{port}/0'],")
    path = user.file(text)
    found = user.finding("tiers", path, label="tier")
    assert found["status"] == "fail"
    says(
        f"{found['found']} {found['means']} {found['fix']}",
        "Requests are served without this tier",
        "Start that server",
    )
    assert "hunter2" not in json.dumps(found)
    # It is no reason not to start: the tier is left alone, requests are served.
    done = user.types("launch", path, "--detach")
    assert done.returncode == 0, done.stderr


def cache(user: User, name: str, port: int, listen: int, other: int, secret: str) -> subprocess.Popen[bytes]:
    file = user.folder / f"{name}.secret"
    file.write_text(secret)
    file.chmod(0o600)
    words = ["cache", "serve", "--name", f"{user.name}-{name}", "--socket", str(user.folder / name), "--size", "64MiB"]
    words += ["--admin-port", str(port), "--host-name", name, "--peer-secret-file", str(file)]
    words += ["--peer-listen", f"tcp://127.0.0.1:{listen}", "--peer", f"tcp://127.0.0.1:{other}"]
    with (user.folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-P", "-m", "pdserve", *words], env=user.env, stderr=log)


def test_8_wrong_secret_of_a_peer(user: User) -> None:
    here, there, listen, other = user.ports
    with tempfile.TemporaryDirectory(prefix="pds-") as short:
        user.folder = Path(short)
        secrets = ("the secret of all our hosts, long", "another one, which is just as long")
        first = cache(user, "a", here, listen, other, secrets[0])
        second = cache(user, "b", there, other, listen, secrets[1])
        try:
            deadline = time.monotonic() + 180
            while True:
                done = user.types("doctor", f"http://127.0.0.1:{here}", "--only", "cache", "--json")
                found = json.loads(done.stdout)["findings"] if done.stdout else []
                peers = [f for f in found if f["check"].startswith("peer") and f["status"] == "fail"]
                if peers:
                    break
                assert time.monotonic() < deadline, (done.stdout, (user.folder / "a.log").read_text())
                time.sleep(0.5)
        finally:
            for process in (first, second):
                process.terminate()
            for process in (first, second):
                process.wait(60)
    assert done.returncode == 1
    says(f"{peers[0]['means']} {peers[0]['fix']}", "do not prove the same secret", "the same PDSERVE_PEER_SECRET")


class _WrongClock(http.server.BaseHTTPRequestHandler):
    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(time.time() + 3600, usegmt=True)

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing on the test's stderr."""


def test_9_clock_off(user: User) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _WrongClock) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            found = user.finding("clocks", f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join(10)
    assert found["status"] == "fail"
    assert re.search(r"127\.0\.0\.1 is 3\d\d\d s ahead of this machine", found["found"])
    says(f"{found['found']} {found['fix']}", "s ahead of this machine", "run an NTP client there")


def test_10_gpu_missing(user: User) -> None:
    if list(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists():
        pytest.skip("this machine has a GPU")
    found = user.finding("gpu", "gpu-1p1d")
    assert found["status"] == "fail"
    says(f"{found['found']} {found['fix']}", "no GPU, but the topology needs one", "Set engine.device: cpu")


def test_3b_an_engine_out_of_memory(user: User) -> None:
    """A real engine, started in spite of the estimate, that asks for more than there is."""
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    text = REAL.replace("kv_cache_space_gib: 1", "kv_cache_space_gib: 4000")
    done = user.types("launch", user.file(text, model="demo"), "--detach", "--force", seconds=280)
    assert done.returncode == 1, done.stderr
    says(done.stderr, "could not start", "fix: It does not fit into memory: lower engine.max_model_len")


@pytest.mark.parametrize(
    "page", ["zero-hits", "slow-first-token", "decode-stalls", "disk-full", "digest-failures", "peer-down"]
)
def test_the_page_has_every_symptom(page: str) -> None:
    assert f"{{#{page}}}" in DOCS.read_text()

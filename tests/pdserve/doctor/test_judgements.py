"""What the doctor concludes from facts, without a machine that has them."""

from __future__ import annotations

import dataclasses
import errno
import resource
from typing import Any

import pytest

from pdserve.deploy import state
from pdserve.deploy.hosts import Elsewhere
from pdserve.deploy.preflight import Wanted
from pdserve.doctor import deployment, engine, fit, gpu, kernel, live, memory, network, storage, transport
from pdserve.doctor.engine import Installed
from pdserve.doctor.finding import Finding, exit_code, fail, ok, skip, warn, worst
from pdserve.doctor.live import Measured, Tried
from pdserve.doctor.memory import Node

GIB = 1 << 30
H100: dict[str, Any] = {"name": "H100", "bytes": 80 * GIB, "arch": "sm_90"}
NO_CUDA: dict[str, Any] = {"library": False, "error": "libcuda.so.1: cannot open", "driver": None, "devices": []}


def cuda(*devices: dict[str, Any]) -> dict[str, Any]:
    return {"library": True, "error": "", "driver": "13.0", "devices": list(devices)}


def is_told(finding: Finding, status: str, *words: str) -> None:
    """The status, and the words somewhere; what is not well always says what it means and what to do."""
    assert finding.status == status, finding
    text = f"{finding.found} {finding.means} {finding.fix}"
    for word in words:
        assert word in text, text
    if status in ("warn", "fail"):
        assert finding.means
        assert finding.fix


@pytest.mark.parametrize(
    ("facts", "want", "status", "words"),
    [
        (gpu.Facts(0, NO_CUDA), None, "ok", ["CPU topologies run"]),
        (gpu.Facts(0, NO_CUDA), 0, "ok", ["needs none"]),
        (gpu.Facts(0, NO_CUDA), 2, "fail", ["engine.device: cpu", "--gpus all"]),
        (gpu.Facts(8, NO_CUDA), 2, "fail", ["8 NVIDIA devices", "libcuda.so.1"]),
        (
            gpu.Facts(2, cuda(H100, H100), driver="580.1"),
            2,
            "ok",
            ["2 x H100 (80 GiB, sm_90), driver 580.1, CUDA 13.0"],
        ),
        (gpu.Facts(1, cuda(H100)), 4, "fail", ["1 of 4 GPUs", "gpus"]),
        (gpu.Facts(1, cuda({**H100, "arch": "sm_75"})), 1, "warn", ["sm_75", "sm_80"]),
        (gpu.Facts(0, NO_CUDA, amd=True), None, "ok", ["AMD", "hipcc"]),
    ],
)
def test_gpu(facts: gpu.Facts, want: int | None, status: str, words: list[str]) -> None:
    is_told(gpu.judge(facts, want), status, *words)


@pytest.mark.parametrize(
    ("installed", "wants", "status", "words"),
    [
        (Installed(None, None), None, "warn", ["pip install 'pdserve[cpu]'"]),
        (Installed(None, None), {"cpu"}, "fail", ["pip install 'pdserve[cpu]'"]),
        (Installed("0.25.1", "0.25.1"), {"cpu"}, "fail", ["0.25.1", ">=0.26,<0.33", "pip install"]),
        (Installed("0.32.0", None), {"cpu"}, "fail", ["make setup"]),
        (Installed("0.32.0", "0.32.0+cpu"), {"cpu"}, "ok", ["0.32.0+cpu for cpu"]),
        (Installed("0.32.0", "0.32.0+cpu"), {"cuda"}, "fail", ["engine.device: cpu", "make setup ENGINE=cuda"]),
        (Installed(None, "0.26.0"), {"cuda"}, "ok", ["for cuda"]),
    ],
)
def test_vllm_version(installed: Installed, wants: set[str] | None, status: str, words: list[str]) -> None:
    is_told(engine.judge_version(installed, wants), status, *words)


def test_handshake() -> None:
    answer = {"version": "0.32.0", "import_error": "", "connector_error": "", "seconds": 7.3}
    is_told(engine.judge_handshake(answer), "ok", "7.3 s")
    is_told(
        engine.judge_handshake({**answer, "import_error": "ImportError: x"}), "fail", "ImportError: x", "make setup"
    )
    is_told(engine.judge_handshake({**answer, "connector_error": "lacks f"}), "fail", "lacks f", "supported")


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PDSERVE_KERNELS", raising=False)
    is_told(kernel.judge_cpu("native", "", "/usr/bin/g++"), "ok", "g++")
    is_told(kernel.judge_cpu("numpy", "no compiler", ""), "warn", "no compiler", "apt-get install g++")
    is_told(kernel.judge_gpu(kernel.GpuPath("sm_90", "compiled with NVRTC 13.0")), "ok", "sm_90: compiled with NVRTC")
    is_told(kernel.judge_gpu(kernel.GpuPath("sm_90", "", "no nvcc found")), "warn", "no nvcc found", "CUDA_HOME", "nvidia-cuda-nvrtc")
    is_told(kernel.judge_gpu(kernel.GpuPath("gfx942", "", "no hipcc found")), "warn", "Install hipcc (ROCm)")
    monkeypatch.setenv("PDSERVE_KERNELS", "torch")
    is_told(kernel.judge_gpu(kernel.GpuPath("sm_90", "", "PDSERVE_KERNELS=torch")), "warn", "Unset PDSERVE_KERNELS")


def test_shared_memory_and_leftovers() -> None:
    is_told(memory.judge_shared_memory(2 * GIB, None, 0), "ok")
    is_told(memory.judge_shared_memory(2 * GIB, 2 * GIB, 0), "ok", "fits")
    is_told(memory.judge_shared_memory(GIB, 2 * GIB, GIB), "ok", "this deployment's")
    is_told(memory.judge_shared_memory(GIB, 2 * GIB, 0), "fail", "cache.size", "remount,size=3g", "--shm-size")
    files = {"/dev/shm/pdserve-a.arena": GIB, "/dev/shm/pdserve-a.journal": 1, "/dev/shm/pdserve-b.arena": GIB}
    files["/dev/shm/pdserve-a.journal.new"] = 1
    found = memory.judge_leftovers(files, ["/dev/shm/pdserve-a.arena"])
    is_told(found, "warn", "1.0 GiB: pdserve-b.arena", "pdserve stop", "rm /dev/shm/pdserve-b.arena")
    assert "pdserve-a" not in found.found
    is_told(memory.judge_leftovers({}, []), "ok")


def test_huge_pages_and_memory_lock() -> None:
    is_told(memory.judge_huge_pages(0, "never", 64 * GIB), "ok", "given to the arena", "never")
    is_told(memory.judge_huge_pages(errno.EINVAL, "never", GIB), "ok", "small ones are enough")
    is_told(memory.judge_huge_pages(errno.EINVAL, "never", 64 * GIB), "warn", "Linux 6.1", "remount,huge=within_size")
    is_told(memory.judge_huge_pages(errno.EINVAL, "deny", 64 * GIB), "warn", "echo never", "deny forbids")
    is_told(memory.judge_huge_pages(errno.ENOMEM, "never", 64 * GIB), "warn", "compact_memory")
    is_told(memory.judge_memory_lock(resource.RLIM_INFINITY, GIB, ["mlx5_0"]), "ok")
    is_told(memory.judge_memory_lock(8 << 20, GIB, []), "ok", "only RDMA")
    is_told(memory.judge_memory_lock(8 << 20, GIB, ["mlx5_0"]), "warn", "mlx5_0", "ulimit -l unlimited")


def test_numa() -> None:
    two = [Node(0, (0, 1)), Node(1, (2, 3))]
    is_told(memory.judge_numa([], {}), "skip")
    is_told(memory.judge_numa(two[:1], {"decode-0": [0, 1]}), "ok", "one node")
    is_told(memory.judge_numa(two, {"decode-0": [2, 3]}), "ok", "2 nodes")
    is_told(memory.judge_numa(two, {"decode-0": [1, 2, 3]}), "warn", "decode-0", 'cpus: "1"')


def test_ports() -> None:
    wanted = [Wanted("prefill[0].port", "127.0.0.1", 8100), Wanted("proxy.port", "127.0.0.1", 8000)]
    free = {"prefill[0].port": "", "proxy.port": ""}
    taken = {**free, "proxy.port": "Address already in use (pid 7, nginx)"}
    (found,) = network.judge_ports(wanted, free)
    is_told(found, "ok", "8100, 8000: free")
    (found,) = network.judge_ports(wanted, taken)
    is_told(found, "fail", "proxy.port 8000", "pid 7, nginx", "another number")
    (found,) = network.judge_ports_in_use(wanted, taken, {})
    is_told(found, "warn", "prefill[0].port 8100 is free", "pdserve status")
    every = dict.fromkeys(free, "in use")
    (found,) = network.judge_ports_in_use(wanted, every, dict.fromkeys(free))
    is_told(found, "ok", "by this deployment")
    (found,) = network.judge_ports_in_use(wanted, every, {"proxy.port": 4711})
    is_told(found, "fail", "pid 4711 listens there", "Stop pid 4711")


def test_clocks() -> None:
    is_told(network.judge_clocks([network.Clock("a", 0.4), network.Clock("b", error="timed out")]), "ok")
    is_told(network.judge_clocks([network.Clock("a", 5.2)]), "warn", "a is 5 s ahead", "NTP")
    is_told(network.judge_clocks([network.Clock("a"), network.Clock("b", -3600)]), "fail", "b is 3600 s behind", "NTP")
    is_told(network.judge_clocks([network.Clock("a", error="refused")]), "skip", "refused")


def test_disk() -> None:
    def space(free: int, cap: int, held: int = 0) -> Finding:
        return storage.judge_space("/kv", free, held, cap, floor=GIB)

    is_told(space(100 * GIB, 50 * GIB), "ok", "cap 50.0 GiB")
    is_told(space(10 * GIB, 50 * GIB), "warn", "Set cache.disk.size to 9GiB")
    is_told(space(10 * GIB, 50 * GIB, held=45 * GIB), "ok")
    is_told(space(GIB, 50 * GIB), "fail", "cache.disk.path")
    is_told(space(GIB, 0), "ok", "no disk tier")
    is_told(space(0, 0), "warn", "PDSERVE_RUN_DIR")
    is_told(storage.judge_speed("/kv", storage.Speed(1e9, 2e9, True), needed=True), "ok", "read 2000 MB/s (O_DIRECT)")
    is_told(storage.judge_speed("/kv", storage.Speed(1e8, 1e8, False), needed=True), "warn", "NVMe", "page cache")
    is_told(storage.judge_speed("/kv", storage.Speed(1e8, 1e8, True), needed=False), "ok")


def test_transports() -> None:
    up, down = transport.Device("mlx5_0", "1", "ACTIVE", "400 Gb/sec"), transport.Device("mlx5_1", "1", "DOWN", "")
    ucxx = {"ucxx": {"version": "1.21.0", "error": ""}}
    broken = {"ucxx": {"version": "", "error": "ImportError: libucp.so.0"}}
    is_told(transport.judge([], {}, "tcp"), "ok", "tcp:// serves")
    is_told(transport.judge([up, down], ucxx, "ucx"), "ok", "mlx5_0/1 ACTIVE 400 Gb/sec", "ucxx 1.21.0")
    is_told(transport.judge([down], ucxx, "tcp"), "warn", "no port of it is up")
    is_told(transport.judge([up], {}, "tcp"), "warn", "pip install 'pdserve[ucx]'")
    is_told(transport.judge([], {}, "ucx"), "fail", "peers.transport: ucx", "pip install 'pdserve[ucx]'")
    is_told(transport.judge([], broken, "ucx"), "fail", "libucp.so.0")
    is_told(transport.judge([], broken, "tcp"), "warn", "libucp.so.0", "tcp:// serves")


def record(name: str, to: state.ProcessState, **more: Any) -> state.ProcessRecord:
    return state.ProcessRecord(
        name=name, role="decode", url="", ready_url="", log=f"/logs/{name}.log", state=to, **more
    )


def test_processes() -> None:
    def judged(*records: state.ProcessRecord) -> Finding:
        facts: dict[str, Any] = {"topology": "", "model": "", "url": "", "pid": 1, "created": 0.0, "started": 0.0}
        return deployment.judge_processes(state.Deployment(name="d", run_dir="", processes=list(records), **facts))

    is_told(judged(record("a", "ready")), "ok", "1 ready")
    is_told(
        judged(record("a", "ready"), record("b", "failed", detail="exited")), "fail", "b failed (exited)", "/logs/b.log"
    )
    is_told(judged(record("a", "ready", restarts=2)), "warn", "a restarted 2 times", "/logs/a.log")


def test_peers_and_other_hosts() -> None:
    facts = {"name": "b", "url": "tcp://10.0.0.2:7900", "state": "up", "chunks": 7, "error": ""}
    is_told(deployment.judge_peer(facts), "ok", "7 chunks")
    is_told(
        deployment.judge_peer({**facts, "state": "down", "error": "refused"}), "warn", "refused", "tcp://10.0.0.2:7900"
    )
    wrong = {**facts, "state": "down", "error": "b does not know the shared secret"}
    is_told(deployment.judge_peer(wrong), "fail", "PDSERVE_PEER_SECRET")
    other = Elsewhere("decode-0", "decode", "b", "http://10.0.0.2:8200", "http://10.0.0.2:8200/health")
    is_told(network.judge_other(other, ""), "ok", "decode-0 answers")
    is_told(network.judge_other(other, "refused"), "warn", "--host b", "firewall")


def test_cache_and_its_tiers() -> None:
    facts = {"chunks": 3, "used_bytes": GIB, "capacity_bytes": 2 * GIB, "clients": ["prefill-0/scheduler"]}
    is_told(deployment.judge_cache(facts, 0), "ok", "3 chunks, 1.00 of 2.00 GiB, 1 clients")
    is_told(deployment.judge_cache(facts, 2), "warn", "2 digest failures", "memtester")
    is_told(deployment.judge_cache({**facts, "clients": []}, 0), "fail", "No engine is connected")
    is_told(deployment.judge_cache({**facts, "clients": []}, 0, expects_clients=False), "ok")
    is_told(deployment.judge_tier("disk", {"state": "ok", "chunks": 1}), "ok")
    is_told(deployment.judge_tier("redis", {"state": "open: refused"}), "warn", "open: refused", "pdserve cache status")


TRIED = Tried(
    prompt_tokens=552,
    chunk_tokens=256,
    cold_ttft=1.0,
    warm_ttft=0.1,
    cold_cached=0,
    warm_cached=551,
    external_cold=551,
    external_warm=551,
    emptied=True,
    is_pd=True,
)


@pytest.mark.parametrize(
    ("changed", "status", "words"),
    [
        ({}, "ok", ["cold 1.00 s, warm 0.10 s, 551 hit (551 from pdserve)"]),
        ({"external_cold": 0}, "fail", ["did not hand over", "handover not begun"]),
        ({"warm_cached": 0}, "fail", ["computed twice", "clients"]),
        ({"warm_cached": None, "external_warm": 0}, "fail", ["computed twice"]),
        ({"warm_cached": 256}, "warn", ["Of 512 tokens", "cache.size"]),
        ({"external_warm": 0}, "fail", ["still only 0 tokens"]),
        ({"external_warm": 0, "emptied": False, "is_pd": False}, "ok", ["VLLM_SERVER_DEV_MODE"]),
        ({"external_cold": None, "external_warm": None, "emptied": False}, "ok", ["(- from pdserve)"]),
    ],
)
def test_hits(changed: dict[str, Any], status: str, words: list[str]) -> None:
    is_told(live.judge_hits(dataclasses.replace(TRIED, **changed)), status, *words)


def test_lines_and_where_they_cross() -> None:
    assert fit.line([(100, 1.1), (200, 2.1), (300, 3.1)]) == pytest.approx((0.1, 0.01))
    assert fit.line([(100, 2.0), (200, 1.0)]).slope == 0.0  # noise; time never falls with length
    slow, fast = fit.Line(0.0, 0.01), fit.Line(0.5, 0.001)
    assert fit.crossing(slow, fast) == pytest.approx(0.5 / 0.009)
    assert fit.crossing(fast, slow) is None
    assert fit.crossing(slow, fit.Line(0.0, 0.001)) == 0.0
    assert fit.crossing(fit.Line(1.0, 0.01), fit.Line(0.5, 0.01)) == 0.0


def test_break_even() -> None:
    cold = [(300, 0.30), (1000, 1.00), (2600, 2.60)]
    found = live.judge_break_even(Measured(cold, [(300, 0.45), (1000, 0.46), (2600, 0.48)], True), 256)
    is_told(found, "ok", "loading wins from 512 tokens on", "1000 tokens/s computed")
    assert found.facts["tokens"] == 512
    is_told(live.judge_break_even(Measured(cold, [(n, s + 1) for n, s in cold], True), 256), "warn", "never", "tuning")
    is_told(live.judge_break_even(Measured(cold[:1], cold[:1], True), 256), "skip")
    is_told(live.judge_break_even(Measured(cold, cold[:1] * 3, False), 256), "ok", "VLLM_SERVER_DEV_MODE")


def test_the_worst_decides_the_exit_code() -> None:
    fine, left_out, odd, bad = ok("a", ""), skip("b", ""), warn("c", "", "m", "f"), fail("d", "", "m", "f")
    assert [exit_code(f) for f in ([], [fine], [fine, left_out], [odd, fine], [odd, bad, fine])] == [0, 0, 0, 4, 1]
    assert worst([fine, odd]) == "warn"

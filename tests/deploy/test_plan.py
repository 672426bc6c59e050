"""The plan: which processes, in which order, with which cores and GPUs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from pdserve import topology, topology_yaml
from pdserve.deploy import plan as plans
from pdserve.deploy.plan import Plan, Process


def planned(text: str, cores: int = 4, tmp: Path = Path("/run")) -> Plan:
    return plans.make(topology.parse(text), list(range(cores)), python="/venv/bin/python", run_root=tmp)


def of(plan: Plan, name: str) -> Process:
    return next(process for process in plan.processes if process.name == name)


PD = """
name: pd
model: demo
engine: {device: cpu}
prefill: [{port: 8100}, {port: 8101}]
decode: [{port: 8200}]
plain: [{port: 8300}]
cache: {size: 1GiB, admin_port: 8081}
proxy: {port: 8001, prefill_timeout: 30}
"""


def test_names_order_and_dependencies() -> None:
    plan = planned(PD)
    depends = {process.name: process.depends for process in plan.processes}
    assert depends == {
        "cache": (),
        "prefill-0": ("cache",),
        "prefill-1": ("cache",),
        "decode-0": ("cache",),
        "plain-0": (),  # only compared with: waits for nobody, nobody waits for it
        "proxy": ("cache", "prefill-0", "prefill-1", "decode-0"),
    }
    assert plan.url == "http://127.0.0.1:8001"


def test_cache_and_proxy_command_lines() -> None:
    plan = planned(PD)
    start = ("/venv/bin/python", "-P", "-m", "pdserve")
    assert of(plan, "cache").argv == (
        *(*start, "cache", "serve", "--name", "pd", "--socket", "/run/pd/cache.sock", "--size", str(1 << 30)),
        *("--chunk-tokens", "256", "--admin-host", "127.0.0.1", "--admin-port", "8081"),
    )
    assert of(plan, "cache").ready_url == "http://127.0.0.1:8081/healthz"
    assert Path("/dev/shm/pdserve-pd.arena") in of(plan, "cache").leftovers
    assert of(plan, "proxy").argv == (
        *(*start, "proxy", "--host", "127.0.0.1", "--port", "8001"),
        *("--prefill", "prefill-0=http://127.0.0.1:8100", "--prefill", "prefill-1=http://127.0.0.1:8101"),
        *("--decode", "decode-0=http://127.0.0.1:8200", "--cache", "cache=http://127.0.0.1:8081"),
        *("--state-file", "/run/pd/state.json"),
        *("--model", "smollm2-135m-instruct"),
        *("--policy", "round_robin", "--engine", "vllm", "--prefill-timeout", "30"),
    )


def test_traces_of_proxy_cache_and_engines_go_to_one_place() -> None:
    plan = planned(PD + "tracing: {endpoint: 'http://collector:4318', sample: 0.5}\n")
    for name in ("proxy", "cache"):
        argv = of(plan, name).argv
        assert argv[argv.index("--otlp-endpoint") + 1 : argv.index("--otlp-endpoint") + 4] == (
            "http://collector:4318", "--trace-sample", "0.5",
        )  # fmt: skip
    engine = of(plan, "prefill-0")
    assert engine.argv[engine.argv.index("--otlp-traces-endpoint") + 1] == "http://collector:4318/v1/traces"
    assert engine.env["OTEL_SERVICE_NAME"] == "prefill-0"
    assert engine.env["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"
    assert not any("otlp" in word for process in planned(PD).processes for word in process.argv)


def test_the_parts_accept_these_command_lines() -> None:
    """Plan and parts are written apart; their options must meet."""
    import argparse

    from pdserve import cli_cache
    from pdserve.proxy import options

    plan = planned(PD)
    parser = argparse.ArgumentParser()
    cli_cache.add_arguments(parser)
    args = parser.parse_args(list(of(plan, "cache").argv[5:]))
    assert (args.action, args.admin_port, args.name) == ("serve", 8081, "pd")
    made = options.parse(of(plan, "proxy").argv[5:])
    assert [name for name, _, _ in made.instances] == ["prefill-0", "prefill-1", "decode-0"]
    assert made.caches == (("cache", "http://127.0.0.1:8081"),)
    assert made.deadlines.prefill == 30


def test_policies_of_the_topology_are_those_of_the_proxy() -> None:
    from pdserve.proxy.policies import base

    assert set(topology_yaml.choices("proxy.policy", topology._SECTIONS)) == set(base.names())


def cpus(text: str, cores: int) -> list[str]:
    return [instance.cpus for instance in planned(text, cores).topology.instances]


@pytest.mark.parametrize(
    ("cores", "expected"),
    [(8, ["0,1", "2,3", "4,5", "6,7"]), (4, ["0", "1", "2", "3"]), (2, ["0", "1", "0", "1"]), (1, ["0"] * 4)],
)
def test_cores_are_shared_out_in_turn(cores: int, expected: list[str]) -> None:
    assert cpus(PD, cores) == expected


def test_named_cores_are_left_to_who_named_them() -> None:
    assert cpus(PD.replace("{port: 8200}", '{port: 8200, cpus: "0-1"}'), 5) == ["2", "3", "0-1", "4"]


def test_ranks_get_cores_of_their_own() -> None:
    text = "name: t\nmodel: demo-tp\nengine: {device: cpu, tensor_parallel_size: 2}\nplain: [{port: 8300}]\n"
    assert cpus(text, 4) == ["0,1|2,3"]
    assert cpus(text, 1) == ["0|0"]


def test_gpus_are_given_out_in_order_around_those_named() -> None:
    text = """
name: g
model: org/m
engine: {tensor_parallel_size: 2}
prefill: [{port: 8100}]
decode: [{port: 8200, gpus: [1, 2]}, {port: 8201}]
cache: {size: 1GiB}
"""
    assert [i.gpus for i in planned(text).topology.instances] == [(0, 3), (1, 2), (4, 5)]


def test_each_rank_of_a_pipeline_gets_a_gpu_and_chunks_get_the_groups_that_all_stages_need() -> None:
    text = """
name: g
model: org/m
engine: {tensor_parallel_size: 2}
prefill: [{port: 8100, pipeline_parallel_size: 2}, {port: 8101, tensor_parallel_size: 1, pipeline_parallel_size: 3}]
decode: [{port: 8200}]
plain: [{port: 8300, pipeline_parallel_size: 5}]
cache: {size: 1GiB}
"""
    plan = planned(text)
    assert [i.gpus for i in plan.topology.of("prefill")] == [(0, 1, 2, 3), (4, 5, 6)]
    for name in ("prefill-0", "prefill-1", "decode-0"):
        words = of(plan, name).argv
        config = json.loads(words[words.index("--kv-transfer-config") + 1])
        assert config["kv_connector_extra_config"]["pdserve.layer_groups"] == 6
    words = of(plan, "prefill-0").argv
    assert words[words.index("--pipeline-parallel-size") + 1] == "2"
    assert "--pipeline-parallel-size" not in of(plan, "decode-0").argv
    assert planned(text.replace("1GiB", "1GiB, layer_groups: 12")).context.layer_groups == 12


def test_expand_cores() -> None:
    assert plans.expand_cores("0-2,5|7") == [0, 1, 2, 5, 7]
    assert plans.expand_cores("") == []


def test_shell_form_can_be_typed() -> None:
    line = of(planned(PD), "prefill-0").shell()
    assert line.startswith("DO_NOT_TRACK=1 ")
    assert "--kv-transfer-config '{" in line


def test_a_password_goes_through_the_environment_and_is_shown_nowhere() -> None:
    tiers = '["redis://:p%40ss@kv:6379/1?ttl=60", "redis://me:${MINE}@kv", "file:///srv"]'
    plan = planned(PD.replace("admin_port: 8081}", f"admin_port: 8081, tiers: {tiers}}}"))
    cache = of(plan, "cache")
    urls = [word for before, word in itertools.pairwise(cache.argv) if before == "--tier"]
    assert urls == ["redis://:${PDSERVE_TIER_0_PASSWORD}@kv:6379/1?ttl=60", "redis://me:${MINE}@kv", "file:///srv"]
    assert cache.env["PDSERVE_TIER_0_PASSWORD"] == "p@ss"
    shown = [
        text for process in plan.processes for text in (process.shell(), *process.argv, *process.shown_env().values())
    ]
    assert not any("p@ss" in text or "p%40ss" in text for text in shown)
    assert "PDSERVE_TIER_0_PASSWORD=..." in cache.shell()


def test_the_measured_choice_between_both_ways_reaches_the_proxy() -> None:
    from pdserve.proxy import options

    assert options.parse(of(planned(PD.replace("prefill_timeout: 30}", "pd_adaptive: true}")), "proxy").argv[5:]).pd_adaptive
    assert not options.parse(of(planned(PD), "proxy").argv[5:]).pd_adaptive


def test_targets_and_classes_reach_the_proxy() -> None:
    from pdserve.proxy import options

    wanted = "slo_ttft: 2, slo_itl: 0.1, slo_classes: {fast: {ttft: 0.5, priority: -5}, slow: {itl: 1}}}"
    plan = planned(PD.replace("prefill_timeout: 30}", wanted))
    classes = options.parse(of(plan, "proxy").argv[5:]).classes.by_name
    assert [(c.name, c.ttft, c.itl, c.priority) for c in classes.values()] == [
        ("default", 2.0, 0.1, 0), ("fast", 0.5, 0.0, -5), ("slow", 0.0, 1.0, 0),
    ]  # fmt: skip

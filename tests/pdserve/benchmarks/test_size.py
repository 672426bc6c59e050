"""Sizing: KV bytes, fits, chunks of a plan, a simulation whose figures can be worked out by hand, and the advice."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from pdserve import cli_size
from pdserve.bench import results, workloads
from pdserve.bench.plan import Agent, Piece, Plan, Session, Stage, Step, single
from pdserve.bench.record import Record
from pdserve.bench.results import Result, Run
from pdserve.bench.size import advise, check, kv_bytes, speeds, work
from pdserve.bench.size.simulate import GIB, Setup, simulate
from pdserve.bench.size.speeds import Speeds, Tier
from pdserve.errors import ConfigError

KV = 1000  # bytes per token
FAST = Speeds(source="", base=0.0, linear=0.001, token=0.01, tiers={"dram": Tier(bytes_per_second=1e7)}, gpu_tokens=0)
QWEN3_8B = {
    "num_hidden_layers": 36, "num_key_value_heads": 8, "num_attention_heads": 32, "head_dim": 128, "torch_dtype": "bfloat16",
}  # fmt: skip


def setup(tokens: int = 10**6, instances: int = 1, **more: object) -> Setup:
    return Setup(instances, (("dram", tokens),), KV, **more)  # type: ignore[arg-type]


def plan(*sessions: Session, users: int = 1) -> Plan:
    return Plan("test", 0, (Stage("all", sessions, concurrency=users),))


@pytest.mark.parametrize(
    ("config", "dtype", "wanted"),
    [
        (QWEN3_8B, "auto", 147456),
        (QWEN3_8B, "fp8", 73728),
        ({"text_config": QWEN3_8B}, "auto", 147456),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}, "float32", 2 * 2 * 4 * 16 * 4),
        ({"num_hidden_layers": 60, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, "bfloat16", 60 * 576 * 2),
        ({**QWEN3_8B, "layer_types": ["full_attention"] + ["linear_attention"] * 3}, "auto", 4096),
    ],
)
def test_kv_of_a_token(config: dict, dtype: str, wanted: int) -> None:
    assert kv_bytes.per_token(config, dtype) == wanted


def test_a_config_that_says_too_little_is_refused() -> None:
    with pytest.raises(ConfigError, match="--kv-bytes-per-token"):
        kv_bytes.per_token({"num_hidden_layers": 3})
    with pytest.raises(ConfigError, match="Known: float32"):
        kv_bytes.per_token(QWEN3_8B, "int3")


def test_a_fit_finds_the_curve_and_never_runs_backwards() -> None:
    points = [(n, 0.02 + 2e-5 * n + 5e-10 * n * n) for n in (2000, 10000, 20000, 30000)]
    assert speeds.fit(points) == pytest.approx((0.02, 2e-5, 5e-10), rel=1e-6)
    assert speeds.fit([(100, 1.0), (200, 2.0)]) == pytest.approx((0.0, 0.01, 0.0), abs=1e-9)
    assert speeds.fit([(100, 2.0), (200, 1.0)])[1] > 0
    assert min(speeds.fit([(100, 1.0), (200, 1.1), (300, 0.9)])) >= 0


def test_a_base_is_no_more_than_a_loaded_prompt_takes() -> None:
    points = [(800, 1.5), (2000, 2.4), (3600, 4.5)]
    assert speeds.fit(points)[0] == pytest.approx(1.22, abs=0.01)
    base, linear, square = speeds.fit(points, 0.25)
    assert base == 0.25
    assert linear >= 0
    assert square >= 0
    assert base + linear * 3600 + square * 3600**2 == pytest.approx(4.5, rel=0.1)
    assert speeds.fit(points, 10.0) == speeds.fit(points)


def test_chunks_are_equal_where_the_text_is() -> None:
    document, other = Piece("doc", 600), Piece("other", 600)
    one = work.of(plan(single("a", (document, Piece("q1", 50)), 1), single("b", (document, Piece("q2", 50)), 1)))
    first, second = (talk.turns[0] for talk in one.stages[0][3])
    assert first.chunks == second.chunks
    assert len(first.chunks) == 2, "650 tokens: two whole chunks, both of the document"
    two = work.of(plan(single("a", (document,), 1), single("b", (other, document), 1)))
    a, b = (talk.turns[0] for talk in two.stages[0][3])
    assert not set(a.chunks) & set(b.chunks), "the same text at another place is another prefix"
    assert [two.parents[c] for c in b.chunks] == [-1, *b.chunks[:-1]]


def test_a_cold_and_a_loaded_prompt_take_what_was_measured() -> None:
    prompt = (Piece("doc", 1024),)
    found = simulate(work.of(plan(single("a", prompt, 11), single("b", prompt, 1))), FAST, setup())
    cold, warm = found.ttfts
    assert cold == pytest.approx(1.024)
    assert warm == pytest.approx(1024 * KV / 1e7 + 0.001), "loaded, and the last token computed"
    assert found.hits == {"dram": 1024}
    assert found.hit_rate == pytest.approx(0.5)
    assert found.seconds == pytest.approx(1.024 + 10 * 0.01 + warm)


def test_prompts_queue_and_instances_share_the_tiers() -> None:
    sessions = [single(f"s{n}", (Piece(f"s{n}", 1000),), 1) for n in range(4)]
    one = simulate(work.of(plan(*sessions, users=4)), FAST, setup())
    assert sorted(one.ttfts) == pytest.approx([1, 2, 3, 4])
    two = simulate(work.of(plan(*sessions, users=4)), FAST, setup(instances=2))
    assert sorted(two.ttfts) == pytest.approx([1, 1, 2, 2])
    again = [single(f"r{n}", (Piece("doc", 1024),), 1) for n in range(4)]
    shared = simulate(work.of(plan(*again)), FAST, setup(instances=4))
    assert shared.hits["dram"] == 3 * 1024


def test_loading_that_is_slower_than_computing_is_left() -> None:
    slow = Speeds(
        source="", base=0.0, linear=0.001, token=0.01, tiers={"dram": Tier(bytes_per_second=1e5)}, gpu_tokens=0
    )
    prompt = (Piece("doc", 1024),)
    found = simulate(work.of(plan(single("a", prompt, 1), single("b", prompt, 1))), slow, setup())
    assert found.hits == {}
    assert found.ttfts[1] == pytest.approx(1.024)


def test_what_does_not_fit_is_evicted() -> None:
    def ask(n: int) -> Session:
        return single(f"r{n}", (Piece(f"doc-{n % 4}", 1024),), 1)

    load = work.of(plan(*(ask(n) for n in range(8))))
    assert simulate(load, FAST, setup(4 * 1024)).hits == {"dram": 4 * 1024}
    assert simulate(load, FAST, setup(2 * 1024)).hits.get("dram", 0) < 4 * 1024
    assert simulate(load, FAST, setup(0)).hits == {}
    own = simulate(load, FAST, setup(0, gpu_tokens=4 * 1024))
    assert own.hits == {"gpu": 4 * 1024}


def test_turns_wait_for_answers_thoughts_and_agents() -> None:
    agent = Agent(1.0, single("agent", (Piece("x", 1000),), 1))
    steps = (Step((Piece("a", 1000),), 101, agents=(agent,)), Step((Piece("b", 500),), 1, think=2.0))
    found = simulate(work.of(plan(Session("user", steps))), FAST, setup())
    # 1 s of computing, 1 s of writing; 1 s until the agent, 1 s of its own; 2 s of thinking, half a second of computing
    assert found.seconds == pytest.approx(1 + 1 + 1 + 1 + 2 + 0.5)
    assert found.requests == 3


def test_a_late_round_counts_from_when_it_was_due() -> None:
    steps = tuple(Step((Piece(f"r{n}", 1000),), 1, at=0.0) for n in range(2))
    found = simulate(work.of(Plan("t", 0, (Stage("all", [Session("u", steps, 0.0)], given=True),))), FAST, setup())
    assert found.ttfts == pytest.approx([1, 2])


def test_a_duration_ends_it_and_fills_are_not_counted() -> None:
    fill = Stage("fill", [single("f", (Piece("doc", 1024),), 1)], measured=False)
    ask = Stage("all", [single(f"r{n}", (Piece("doc", 1024),), 1) for n in range(1000)])
    found = simulate(work.of(Plan("t", 0, (fill, ask))), FAST, setup(duration=1.0))
    assert 5 <= found.requests < 20
    assert found.hits["dram"] == found.requests * 1024


# ---- advice ----


def shared_documents(users: int) -> work.Work:
    sessions = [single(f"r{n}", (Piece(f"doc-{n % 10}", 1024),), 1) for n in range(100)]
    return work.of(plan(*sessions, users=users))


def test_memory_is_bought_before_instances_and_only_what_helps() -> None:
    load = shared_documents(1)
    sizes = [0.0, 10 * 1024 * KV / GIB, 1.0]
    points = advise.sweep(load, FAST, setup(), sizes, 2, target=0.5, quantile=0.85)
    best = advise.choose(points, 0.5)
    assert best is not None
    assert (best.instances, best.gib) == (1, sizes[1])
    advice = advise.advise(points, load, setup(), 0.5, 0.85)
    assert advice.sentences[0].startswith("Buy: 1 instance and")
    assert advice.distinct_gib == pytest.approx(10 * 1024 * KV / GIB)


def test_a_target_that_nothing_keeps_is_said() -> None:
    load = shared_documents(4)
    advice = advise.advise(advise.sweep(load, FAST, setup(), [0.0], 2, 0.01, 0.95), load, setup(), 0.01, 0.95)
    assert advice.best is None
    assert advice.sentences[0].startswith("No simulated setup keeps TTFT p95 <= 0.01 s")


def test_producers_and_consumers_by_what_keeps_them_busy() -> None:
    found = simulate(
        work.of(plan(*(single(f"s{n}", (Piece(f"s{n}", 1000),), 401) for n in range(8)), users=8)), FAST, setup(0)
    )
    # 8 s of computing and 8 x 4 s of writing
    producers, consumers = advise.split(found, seqs=1)
    assert consumers > producers >= 1


def test_the_simulation_beside_a_real_run() -> None:
    found = simulate(work.of(plan(*(single(f"s{n}", (Piece(f"s{n}", 1000),), 1) for n in range(4)))), FAST, setup(0))
    result = Result(workload="test", command="", seed=0, timeout=60)
    result.runs.append(Run(arm="a", repetition=1, seconds=8))
    result.records = [
        Record(arm="a", repetition=1, stage="all", session=f"s{n}", step=0, intended=2.0 * n, ended=2.0 * n + 2, ttft_ms=2000.0,
               latency_ms=2000.0, prompt_tokens=1000, cached_tokens=0)
        for n in range(4)
    ]  # fmt: skip
    rows = {row.name: row for row in check.compare(found, result, "a")}
    assert rows["TTFT p50, s"].ratio == pytest.approx(0.5)
    assert (rows["requests"].ratio, rows["prompt tokens"].ratio) == (1, 1)
    assert check.compare(found, result, "b") == []


# ---- the command ----


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    cli_size.add_arguments(parser)
    return cli_size.main(parser.parse_args(list(words)))


def test_the_command_from_a_workload_to_a_purchase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speeds.json"
    file.write_text(
        json.dumps(
            {
                "source": "made up",
                "base": 0,
                "linear": 0.001,
                "token": 0.01,
                "tiers": {"dram": {"bytes_per_second": 1e7}},
            }
        )
    )
    words = [
        "--kv-bytes-per-token",
        str(KV),
        "--speeds",
        str(file),
        "--workload",
        "long-doc-qa",
        "--scale",
        "0.05",
        "--max-instances",
        "1",
    ]
    assert run(*words, "--slo", "ttft=0.5", "--quantile", "0.6", "--users", "1", "--sizes", "0,1") == 0
    assert "Buy: 1 instance" in capsys.readouterr().out
    assert run(*words, "--slo", "ttft=0.001", "--sizes", "0", "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["kept"] is False
    assert facts["points"][0]["instances"] == 1
    assert run("--kv-bytes-per-token", "1", "--speeds", "h200-8b") == 0
    assert "54.00 GB/s" in capsys.readouterr().out
    for bad in (["--slo", "itl=1"], ["--sizes", "x"], ["--disk", "1TiB"], ["--speeds", str(tmp_path / "no")]):
        with pytest.raises(ConfigError, match=bad[0] if bad[0] != "--disk" else "--disk-speed"):
            run(*words, *bad)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--chunk-tokens", "0"], "--chunk-tokens: 0 is not positive"),
        (["--seqs", "0"], "--seqs: 0 is not positive"),
        (["--max-instances", "0"], "--max-instances: 0 is not positive"),
        (["--scale", "0"], "--scale: 0 is not positive"),
        (["--users", "-1"], "--users: -1 is not at least 0"),
        (["--quantile", "2"], "--quantile: 2 is no part"),
        (["--sizes", "nan"], "--sizes: 'nan'"),
        (["--workload-args", '{"a": 1}'], "is no list"),
        (["--workload-args", '["--nosuch"]'], "unrecognized arguments: --nosuch"),
        (["--workload-args", '["--num-prompts", "0"]'], "nothing to send"),
        (["--trace", "."], "and so is --workload random"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_a_sentence(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run("--kv-bytes-per-token", "1", "--speeds", "h200-8b", "--workload", "random", *words)
    assert said in str(caught.value)


def test_another_workloads_run_checks_nothing(tmp_path: Path) -> None:
    result = Result(workload="all-hit", command="", seed=0, timeout=60)
    result.runs.append(Run(arm="", repetition=1, seconds=1))
    results.write(result, tmp_path, "run")
    with pytest.raises(ConfigError, match="is a run of all-hit, simulated is random"):
        run("--kv-bytes-per-token", "1", "--speeds", "h200-8b", "--workload", "random", "--check", str(tmp_path / "run.json"))


def test_the_command_checks_itself_against_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = workloads.plan_of("all-hit", ["--num-requests", "4"], scale=0.05)
    result = Result(workload="all-hit", command="", seed=0, timeout=60)
    result.runs.append(Run(arm="cache", repetition=1, seconds=1))
    for n, session in enumerate(plan.stages[1].sessions):
        result.records.append(
            Record(arm="cache", repetition=1, stage="hits", session=session.name, step=0, intended=float(n), ended=n + 0.5,
                   ttft_ms=100.0, latency_ms=500.0, prompt_tokens=1000, cached_tokens=768)
        )  # fmt: skip
    (file, _) = results.write(result, tmp_path)
    words = [
        "--kv-bytes-per-token",
        "1000",
        "--speeds",
        "h200-8b",
        "--workload",
        "all-hit",
        "--workload-args",
        '["--num-requests", "4"]',
    ]
    assert run(*words, "--scale", "0.05", "--check", str(file), "--arm", "cache", "--sizes", "1", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["requests"]["ratio"] == 1
    assert rows["hit rate"]["measured"] == pytest.approx(0.768)
    with pytest.raises(ConfigError, match="It has: cache"):
        run(*words, "--check", str(file), "--arm", "x")

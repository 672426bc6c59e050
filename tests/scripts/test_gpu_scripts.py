"""What the GPU scripts decide and reckon, without a GPU: the plan, ratios, timelines, the verdict of the pressure check."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

GPU = Path(__file__).resolve().parents[1] / "gpu"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(GPU))
    try:
        import check_pressure
        import gpu_session
        import pressure_blocks
        import pressure_verdict
        import steps_cost
        import timeline

        yield types.SimpleNamespace(
            pressure=check_pressure, blocks=pressure_blocks, verdict=pressure_verdict, session=gpu_session, cost=steps_cost,
            timeline=timeline,
        )  # fmt: skip
    finally:
        sys.path.remove(str(GPU))
        for name in ("check_pressure", "gpu_session", "pressure_blocks", "pressure_verdict", "steps_cost", "timeline"):
            sys.modules.pop(name, None)


def test_a_dry_run_names_every_step_and_what_is_missing(tmp_path):
    words = [
        sys.executable,
        "-P",
        str(GPU / "run_all.py"),
        "--model",
        str(tmp_path),
        "--out",
        str(tmp_path),
        "--dry-run",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    for step in ("copies", "timeline", "overhead", "pressure", "peers"):
        assert any(line.startswith(step) for line in done.stdout.splitlines()), done.stdout + done.stderr
    assert "MISSING: model's config.json" in done.stdout
    assert done.returncode == 1


def test_ratios_are_of_pairs_and_above_one_is_quicker(scripts):
    speed = {"plain": [100.0, 200.0, 400.0], "ours": [99.0, 210.0, 392.0]}
    assert scripts.cost.pairs(speed, ["ours"], "plain") == {"ours": (0.99, 0.98, 1.05)}
    waits = {"plain": [5.0, 6.0, 8.0], "ours": [10.0, 6.0, 4.0]}
    assert scripts.cost.pairs(waits, ["ours"], "plain", more_is_better=False) == {"ours": (1.0, 0.5, 2.0)}


class Core:
    """As much of an engine as the stamps need."""

    def __init__(self):
        self.scheduler = types.SimpleNamespace(
            schedule=lambda: types.SimpleNamespace(total_num_scheduled_tokens=1),
            update_from_output=lambda ids: {
                0: types.SimpleNamespace(outputs=[types.SimpleNamespace(new_token_ids=ids)])
            },
        )

    def preprocess_add_request(self, request):
        return request


def test_a_timeline_shares_the_whole_time_out_among_its_phases(scripts):
    core = Core()
    llm = types.SimpleNamespace(llm_engine=types.SimpleNamespace(engine_core=types.SimpleNamespace(engine_core=core)))
    watch = scripts.timeline.Timeline(llm, None)
    for _ in range(2):  # the second is not disturbed by the first
        watch.begin()
        assert core.preprocess_add_request("r") == "r"
        core.scheduler.schedule()
        core.scheduler.update_from_output([])  # a step without a token is not the request's
        core.scheduler.update_from_output([7])
        core.scheduler.update_from_output([8])
        found = watch.end()
        whole = found.pop("all")
        assert list(found) == ["input", "hashing", "to its step", "step", "output"]
        assert sum(found.values()) == pytest.approx(whole)
        assert all(ms >= 0 for ms in found.values())


def answer(prompt, last=1, *, turn="cold", top=((1, -0.1), (2, -3.0))):
    first = [[prompt, -0.5], [9, -2.0]]
    return {"turn": turn, "prompt": prompt, "tokens": [prompt, last], "top": [first, [list(pair) for pair in top]]}


def good():
    left = {"saves": 0, "blocks": 0}
    answers = [answer(i) for _ in range(3) for i in range(2)]
    return {
        "answers": answers, "preempted": 3, "aborted": 1, "resets": 1, "running when reset": 4,
        "resets refused by vLLM": 0, "blocks held when refused": [], "loads": 2, "loads that failed": [], "left": left,
    }  # fmt: skip


def control(**change):
    return {k: v for k, v in {**good(), **change}.items() if "loads" not in k}


def ending(*last):
    """good() answers, the last of them another one."""
    return [*good()["answers"][: -len(last)], *last]


WANTED = [answer(0), answer(1)]
REFUSED = {"resets refused by vLLM": 1, "blocks held when refused": [{"request 1": "FINISHED_ABORTED, 8 blocks"}]}
TIED = ((1, -0.6931), (2, -0.6933))


def test_the_pressure_check_finds_each_thing_that_is_wrong(scripts):
    shown, wrong = scripts.verdict.judge(WANTED, good(), control())
    assert (shown["equal"], shown["answers"], shown["control"]["equal"], wrong) == (6, 6, 6, [])
    for change in (
        {"answers": good()["answers"][:-1]},
        {"answers": ending(answer(1, 2, top=((2, -0.1), (1, -3.0))))},
        {"answers": ending(answer(1, top=((1, -0.11), (2, -3.0))))},  # the same tokens, from other KV
        {"preempted": 0}, {"aborted": 0}, {"resets": 0}, {"running when reset": 0}, REFUSED, {"left": {"saves": 0, "blocks": 5}},
    ):  # fmt: skip
        assert len(scripts.verdict.judge(WANTED, {**good(), **change}, control())[1]) == 1
        (said,) = scripts.verdict.judge(WANTED, good(), control(**change))[1]
        assert said.startswith("control: ")
    for change in ({"loads": 0}, {"loads that failed": ["digest"]}):
        assert len(scripts.verdict.judge(WANTED, {**good(), **change}, control())[1]) == 1


def test_a_refused_reset_is_told_with_who_held_the_blocks(scripts):
    (said,) = scripts.verdict.judge(WANTED, {**good(), **REFUSED}, control())[1]
    assert said == "1 resets were refused, blocks held by [{'request 1': 'FINISHED_ABORTED, 8 blocks'}]"


def scheduler_with(requests, *, deferred=(), used=()):
    """As much of vLLM's scheduler as says who has blocks. `requests`: {name: (status, its blocks)}."""

    def request(name, status):
        return types.SimpleNamespace(
            request_id=name, status=types.SimpleNamespace(name=status), num_computed_tokens=256, num_tokens=289
        )

    there = {name: request(name, status) for name, (status, _) in requests.items()}
    used = {0, *used, *deferred, *(i for _, ids in requests.values() for i in ids)}
    blocks = [types.SimpleNamespace(block_id=i, ref_cnt=int(i in used), is_null=i == 0) for i in range(20)]
    return types.SimpleNamespace(
        requests=there, running=[r for r in there.values() if r.status.name == "RUNNING"],
        deferred_frees=[(7, [blocks[i] for i in deferred])] if deferred else [],
        kv_cache_manager=types.SimpleNamespace(
            block_pool=types.SimpleNamespace(blocks=blocks), get_block_ids=lambda name: (requests[name][1],)
        ),
    )  # fmt: skip


def test_who_holds_blocks_without_running(scripts):
    loads, ended, loaded = ("WAITING_FOR_REMOTE_KVS", [3]), ("FINISHED_STOPPED", [4, 5]), ("PREEMPTED", [6, 7])
    others = {"runs": ("RUNNING", [1, 2]), "waits": ("WAITING", []), "is preempted": ("PREEMPTED", [])}
    there = scheduler_with({**others, "loads": loads, "ended": ended, "loaded": loaded}, deferred=[8], used=[9, 10, 11])
    found = scripts.blocks.waiting(there)
    assert found == {
        "loads": "WAITING_FOR_REMOTE_KVS, 1 blocks, 256 of 289 tokens",
        "ended": "FINISHED_STOPPED, 2 blocks, 256 of 289 tokens",
        "loaded": "PREEMPTED, 2 blocks, 256 of 289 tokens",
    }
    assert scripts.blocks.held(there) == {**found, "a step that is under way": "1 blocks", "nobody": "3 blocks"}
    nothing = scheduler_with(others)
    assert scripts.blocks.waiting(nothing) == scripts.blocks.held(nothing) == {}


def test_a_near_tie_of_both_engines_is_told_and_only_the_control_s_kind_is_allowed(scripts):
    wanted = [answer(0), answer(1, top=TIED)]
    tied, same = answer(1, 2, top=((2, -0.6931), (1, -0.6932))), answer(1, top=TIED)
    alike = [answer(0), same] * 2 + [answer(0)]
    ours, plain = {**good(), "answers": [*alike, tied]}, control(answers=[*alike, tied])
    shown, wrong = scripts.verdict.judge(wanted, ours, plain)
    (there,) = shown["different"]
    assert (there["turn"], there["prompt"], there["position"], there["wanted"], there["found"]) == ("cold", 1, 1, 1, 2)
    assert there["logprobs_there"] == {"wanted's": [-0.6931, -0.6933], "found's": [-0.6932, -0.6931]}
    assert (shown["equal"], shown["near ties"], shown["control"]["near ties"], wrong) == (5, 1, 1, [])
    (said,) = scripts.verdict.judge(wanted, ours, control(answers=[*alike, same]))[1]
    assert said == "1 answers differ at near ties, none of the control's does"
    # A tie for one of the two engines only, or with a token that the other has not among its best: KV that is not the same.
    for top in (((2, -0.1), (1, -3.0)), ((2, -0.6931), (7, -0.6932))):
        (said,) = scripts.verdict.judge(wanted, {**ours, "answers": [*alike, answer(1, 2, top=top)]}, plain)[1]
        assert said.startswith("1 answers are not plain vLLM's")


def test_some_prompts_of_the_pressure_check_begin_alike(scripts):
    texts = scripts.pressure.prompts(9, 100)
    assert texts == scripts.pressure.prompts(9, 100)
    assert all(texts[i].startswith(texts[i - 1]) for i in (2, 5, 8))
    assert len(set(texts)) == 9


class Answers:
    """An engine_probe that only counts what it is asked."""

    def __init__(self):
        self.asked = []

    def do(self, name, seconds=60, **arguments):
        self.asked.append((name, arguments))
        calls = {"scheduler build_connector_meta": [10, 1.0], "worker get_finished": [10, 0.5]}
        return {
            "generate": {"tok_s": 100.0, "ms": 50.0}, "itl": {"p50": 5.0, "p99": 6.0}, "calls": calls,
        }.get(name, {})  # fmt: skip


def test_each_arm_follows_another_engine_and_ours_is_told_when_to_be_idle(scripts, monkeypatch):
    ours, plain, null = Answers(), Answers(), Answers()
    monkeypatch.setattr(scripts.session, "table", [])
    run = types.SimpleNamespace(pair=lambda: (ours, plain), started={"null": null}, rounds=1)
    scripts.cost.overhead(run)
    found = scripts.session.results["overhead"]
    assert {len(figures) for of_arm in found.values() for figures in of_arm.values()} == {2}
    assert set(found["new"]) == set(scripts.cost.ARMS)
    for asked in (ours, plain, null):
        seeds = [tuple(a["seeds"]) for name, a in asked.asked if name == "generate" and a["seeds"][0] >= 100000]
        assert len(set(seeds)) == len(seeds), "new is new"
    switched = [a["on"] for name, a in ours.asked if name == "connector"]
    assert switched.count(False) == 3 + 2 * 2 + 2
    assert switched[-1] is True
    assert any("in the connector, new" in what for what, _ in scripts.session.table)

"""Plans: the same seed gives the same text, repeats repeat, and what a workload is known for is there."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from pdserve.bench import workloads
from pdserve.bench.load import messages
from pdserve.bench.plan import Plan, Session, every_step
from pdserve.bench.text import VOCABULARY, Writer, sample
from pdserve.bench.workloads import sharegpt
from pdserve.errors import ConfigError

SHAREGPT = [
    {
        "id": "a",
        "conversations": [
            {"from": "human", "value": "Why is the sky blue?"},
            {"from": "gpt", "value": "Because " * 30},
        ],
    },
    {
        "id": "b",
        "conversations": [
            {"from": "human", "value": "Name a river."},
            {"from": "gpt", "value": "The Rhine."},
            {"from": "human", "value": "Another."},
            {"from": "gpt", "value": "The Loire."},
        ],
    },
    {"id": "c", "conversations": [{"from": "gpt", "value": "nobody asked"}]},
]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, list[str]]:
    """What the workloads that read files need."""
    chats = tmp_path / "chats.json"
    chats.write_text(json.dumps(SHAREGPT))
    traces = tmp_path / "traces"
    traces.mkdir()
    rows = [{"timestamp": 100 * n, "input_length": 700, "output_length": 5, "hash_ids": [1, 10 + n]} for n in range(4)]
    (traces / "timed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"sharegpt": ["--dataset-path", str(chats)], "trace-replay": ["--trace-directory", str(traces)]}


def sessions(plan: Plan, most: int = 2000) -> list[Session]:
    return [s for stage in plan.stages for s in islice(iter(stage.sessions), most)]


def text(plan: Plan, session: Session, step: int = 0) -> str:
    writer = Writer(str(plan.seed))
    return "".join(p.text or writer.block(p.name, p.tokens) for p in session.steps[step].pieces)


@pytest.mark.parametrize("name", workloads.NAMES)
def test_the_same_options_give_the_same_requests_and_another_seed_others(
    name: str, files: dict[str, list[str]]
) -> None:
    words = files.get(name, [])
    one, again, other = (workloads.plan_of(name, words, seed=seed) for seed in (3, 3, 4))
    assert sessions(one)
    assert [text(one, s) for s in sessions(one)] == [text(again, s) for s in sessions(again)]
    if name != "sharegpt":  # its text is the file's
        assert [text(one, s) for s in sessions(one)] != [text(other, s) for s in sessions(other)]


@pytest.mark.parametrize("name", [n for n in workloads.NAMES if n != "sharegpt"])
def test_scale_shrinks_every_length(name: str, files: dict[str, list[str]]) -> None:
    words = files.get(name, [])
    full, small = workloads.plan_of(name, words), workloads.plan_of(name, words, scale=0.1)
    assert small.longest() < full.longest() / 5


def test_every_word_is_one_word() -> None:
    assert len(set(VOCABULARY)) == 256
    assert sample().split() == list(VOCABULARY)


def test_a_block_is_a_function_of_its_name_and_a_shorter_one_its_beginning() -> None:
    a, b = Writer("1"), Writer("2")
    assert a.block("x", 50) == Writer("1").block("x", 50) != b.block("x", 50)
    assert a.block("x", 50).startswith(a.block("x", 20))
    assert len(a.block("x", 50).split()) == 50
    assert len(Writer("1", tokens_per_word=2.0).block("x", 50).split()) == 25


@pytest.mark.parametrize(("mode", "order"), [("tile", [0, 1, 2, 0, 1, 2]), ("interleave", [0, 0, 1, 1, 2, 2])])
def test_long_documents_repeat_in_the_known_orders(mode: str, order: list[int]) -> None:
    plan = workloads.plan_of("long-doc-qa", ["--num-documents", "3", "--repeat-mode", mode])
    first, query = plan.stages
    assert [s.name.split("#")[0] for s in query.sessions] == [f"doc-{n}" for n in order]
    document = text(plan, next(iter(first.sessions)))[:1000]
    asked = [text(plan, s) for s in query.sessions]
    assert sum(t.startswith(document) for t in asked) == 2
    assert len(set(asked)) == len(asked), "each question is another one"


def test_long_documents_with_misses() -> None:
    plan = workloads.plan_of("long-doc-qa", ["--num-documents", "4", "--hit-miss-ratio", "3:1"])
    groups = [s.steps[0].group for s in plan.stages[1].sessions]
    assert groups.count("miss") == len(groups) // 4
    with pytest.raises(ConfigError, match="H:M"):
        workloads.plan_of("long-doc-qa", ["--hit-miss-ratio", "x"])


def test_users_keep_their_schedule_and_their_rate() -> None:
    plan = workloads.plan_of("multi-round-qa", ["--num-users", "4", "--qps", "2", "--num-rounds", "6", "--time", "60"])
    at = sorted((s.start or 0) + (step.at or 0) for s in sessions(plan) for step in s.steps)
    steady = [t for t in at if 10 <= t < 50]
    assert len(steady) / 40 == pytest.approx(2, rel=0.1), "rounds a second"
    users = sessions(plan)
    assert len({text(plan, u)[:3000] for u in users}) == 1, "the system prompt is everybody's"
    assert len({text(plan, u) for u in users}) == len(users), "the history is not"
    assert min(len(u.steps) for u in users) < 6, "some are in the middle of their conversation at the start"
    last = users[-1].steps[-1].pieces
    assert [p.answer_of for p in last if p.role == "assistant"] == list(range(5))


def test_a_given_share_of_each_prompt_was_sent_before() -> None:
    plan = workloads.plan_of("cache-rate", ["--prompt-len", "1000", "--rates", "0,50,100", "--num-prefixes", "2"])
    filled = [text(plan, s).split() for s in plan.stages[0].sessions]
    for stage, share in zip(plan.stages[1:], (0, 500, 1000), strict=True):
        for session in stage.sessions:
            prompt = text(plan, session).split()
            assert len(prompt) == 1000
            known = max(sum(1 for _ in _common(prompt, other)) for other in filled)
            assert share <= known < share + 5
    with pytest.raises(ConfigError, match="percent"):
        workloads.plan_of("cache-rate", ["--rates", "0,200"])


def _common(a: list[str], b: list[str]) -> list[str]:
    same = []
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        same.append(x)
    return same


def test_the_working_set_grows() -> None:
    plan = workloads.plan_of("working-set", ["--working-sets", "8000,40000", "--document-length", "4000"])
    fills = [stage for stage in plan.stages if not stage.measured]
    assert [len(list(s.sessions)) for s in fills] == [2, 10]


def test_random_prompts_share_nothing_and_hits_are_all_there() -> None:
    plan = workloads.plan_of("random", ["--num-prompts", "20"])
    assert len({text(plan, s)[:60] for s in sessions(plan)}) == 20
    plan = workloads.plan_of("all-hit", ["--num-prompts", "2", "--num-requests", "6"])
    filled = {text(plan, s) for s in plan.stages[0].sessions}
    assert {text(plan, s) for s in plan.stages[1].sessions} == filled


def test_retrieved_chunks_overlap_and_popular_ones_more() -> None:
    plan = workloads.plan_of("rag", ["--num-requests", "60", "--num-chunks", "50"])
    drawn = [p.name for s in sessions(plan) for p in s.steps[0].pieces if p.name.startswith("chunk-")]
    assert drawn.count("chunk-0") > 3 * drawn.count("chunk-40")
    kept = workloads.plan_of("rag", ["--keep-order"])
    numbers = [int(p.name[6:]) for p in sessions(kept)[0].steps[0].pieces if p.name.startswith("chunk-")]
    assert numbers == sorted(numbers)


def test_streams_run_alone_first_and_then_beside_long_prompts() -> None:
    idle, busy = workloads.plan_of("pd-interference", ["--streams", "3", "--num-prefills", "2"]).stages
    assert {s.steps[0].group for s in idle.sessions} == {"decode, idle"}
    assert sorted(s.steps[0].group for s in busy.sessions) == ["decode, busy"] * 3 + ["prefill"] * 2
    assert all((s.start or 0) > 1 for s in busy.sessions if s.steps[0].group == "prefill")


def test_conversations_of_a_file(files: dict[str, list[str]], tmp_path: Path) -> None:
    plan = workloads.plan_of("sharegpt", files["sharegpt"])
    assert sorted(len(s.steps) for s in sessions(plan)) == [1, 2], "the one that no human begins is left out"
    step = next(iter(sessions(plan))).steps[0]
    (once,), (again,) = (messages(step, Writer(f"0{salt}", 1.0), {}) for salt in ("/1", "/2"))
    made_up, question = once["content"].split("\n", 1)
    assert len(made_up.split()) == sharegpt.MARK_TOKENS
    assert again["content"].split("\n", 1)[1] == question
    assert not again["content"].startswith(made_up), "or a repetition would hit what the one before has left"
    bad = tmp_path / "bad.json"
    bad.write_text("nothing")
    with pytest.raises(ConfigError, match="neither JSON nor JSONL"):
        workloads.plan_of("sharegpt", ["--dataset-path", str(bad)])


def test_an_unknown_workload_and_a_negative_length_are_refused() -> None:
    with pytest.raises(ConfigError, match="Known: long-doc-qa"):
        workloads.plan_of("nothing")
    with pytest.raises(ConfigError, match="negative"):
        workloads.plan_of("random", num_prompts=-1)


def test_steps_of_sub_agents_are_counted() -> None:
    plan = workloads.plan_of("all-hit")
    assert all(len(list(every_step(s))) == 1 for s in sessions(plan))

"""Reading recorded requests, and what a replay makes of them."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from pdserve.bench import traces, workloads
from pdserve.bench.plan import Session
from pdserve.bench.text import Writer
from pdserve.errors import ConfigError


def turn(at: float, blocks: list[int], tail: int = 10, **more: Any) -> dict[str, Any]:
    return {"t": at, "type": "n", "in": 64 * len(blocks) + tail, "out": 32, "hash_ids": blocks, "api_time": 2.0} | more


CONVERSATION = {
    "id": "t", "block_size": 64, "hash_id_scope": "local", "tool_tokens": 128, "system_tokens": 128,
    "requests": [
        turn(0.0, [1, 2, 3, 4, 5], think_time=0.0),
        # two sub-agents side by side, noted when they ended
        {"t": 13.0, "type": "subagent", "duration_ms": 10000, "tool_tokens": 64, "system_tokens": 64,
         "requests": [turn(0.0, [50, 51, 52]), turn(4.0, [50, 51, 52, 53], think_time=2.0)]},
        {"t": 20.0, "type": "subagent", "duration_ms": 17000, "tool_tokens": 64, "system_tokens": 64,
         "requests": [turn(0.0, [50, 51, 60])]},
        turn(25.0, [1, 2, 3, 4, 5, 6], think_time=23.0),
        turn(60.0, [1, 2, 3, 4, 5, 6, 7], think_time=3.0),
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.json").write_text(json.dumps(CONVERSATION))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(CONVERSATION).encode()))
    return tmp_path


def replay(path: Path, *words: str, **overrides: object) -> tuple[list[Session], list[Session]]:
    """(what fills, the first sessions of the last stage)."""
    plan = workloads.plan_of("trace-replay", ["--trace-directory", str(path), *words], **overrides)
    *fills, last = plan.stages
    return [s for stage in fills for s in stage.sessions], list(islice(iter(last.sessions), 6))


def text(session: Session, step: int) -> str:
    writer = Writer("0")
    return "".join(writer.block(p.name, p.tokens) for p in session.steps[step].pieces)


def test_plain_and_gzip_are_read_alike(folder: Path) -> None:
    plain, packed = traces.read(folder)
    assert plain.calls == packed.calls
    assert plain.shared_tokens == 256
    assert [c.prompt_tokens for c in plain.calls] == [330, 394, 458]


def test_sub_agents_begin_after_the_answer_before_them_and_their_parent_waits(folder: Path) -> None:
    call = next(traces.read(folder)).calls[0]
    assert [(s.delay, s.joined, len(s.calls)) for s in call.spawned] == [(1.0, True, 2), (1.0, True, 1)]
    _, sessions = replay(folder)
    first, second, third = sessions[0].steps
    assert [a.delay for a in first.agents] == [1.0, 1.0]
    assert second.think == 5.0, (
        "the recorded think time contains the waiting; what is left counts from the last agent's end"
    )
    assert third.think == 3.0


def test_text_repeats_where_the_ids_do(folder: Path) -> None:
    _, sessions = replay(folder, "--warm-prefix-pct", "0")
    session = sessions[0]
    one, two = text(session, 0).split(), text(session, 1).split()
    assert (len(one), len(two)) == (330, 394)
    assert one[:320] == two[:320]
    assert one[320:] != two[320:330], "five blocks are common, the tails are not"
    agents = [a.session for a in session.steps[0].agents]
    assert text(agents[0], 0).split()[:128] == text(agents[1], 0).split()[:128]
    assert text(agents[0], 0).split()[128:192] != text(agents[1], 0).split()[128:192]


def test_every_user_is_another_one_except_for_the_shared_beginning(folder: Path) -> None:
    fill, sessions = replay(folder, "--warm-prefix-pct", "0.5")
    begins = [text(s, 0).split() for s in sessions]
    assert all(b[:128] == begins[0][:128] for b in begins), "half of 256 tokens of tools and system prompt"
    assert len({tuple(b[128:192]) for b in begins}) == len(begins), "also when a trace comes round again"
    assert begins[0][:128] == text(fill[0], 0).split()[:128], "the beginning is sent first"


def test_without_recycling_each_conversation_comes_once(folder: Path) -> None:
    assert len(replay(folder, "--no-recycle")[1]) == 2


def test_lengths_times_and_contexts_shrink(folder: Path) -> None:
    _, sessions = replay(folder, "--time-scale", "0.1", "--max-output", "2", "--max-delay", "0.4", scale=1 / 16)
    steps = sessions[0].steps
    assert [s.prompt_tokens for s in steps] == [21, 25, 29]
    assert [s.output_tokens for s in steps] == [2, 2, 2]
    assert steps[1].think == pytest.approx(0.4)
    assert steps[2].think == pytest.approx(0.3)
    assert text(sessions[0], 0).split()[:20] == text(sessions[0], 1).split()[:20]
    assert len(replay(folder, "--max-context", "430")[1][0].steps) == 2, "it ends where the context would be passed"
    with pytest.raises(ConfigError, match="--scale"):
        replay(folder, "--max-context", "100")


def test_timed_requests_come_in_when_they_did(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1500, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"timestamp": 4000, "input_length": 1536, "output_length": 5, "hash_ids": [1, 2, 9]},
    ]
    file = tmp_path / "timed.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    _, sessions = replay(file, "--time-scale", "0.5")
    assert [s.start for s in sessions] == [0.0, 2.0]
    one, two = (text(s, 0).split() for s in sessions)
    assert (len(one), len(two)) == (1500, 1536)
    assert one[:1024] == two[:1024]
    assert one[1024:1100] != two[1024:1100]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.json", "{}", "no trace of kv-cache-tester"),
        ("x.json", "no json", "no trace of kv-cache-tester"),
        ("x.json.gz", "not packed", "cannot be read"),
        ("x.jsonl", '{"timestamp": 1}', "line 1 of"),
    ],
)
def test_what_is_no_trace_is_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=said):
        list(traces.read(tmp_path))
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=r"no \.json"):
        list(traces.read(tmp_path))

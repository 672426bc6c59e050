"""Every workload of `pdserve bench`, small, against real engines: what is planned is what arrives, and what repeats is hit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdserve.bench import records_of, runner, workloads
from pdserve.bench.load import Options, Outcome
from pdserve.bench.plan import every_step
from pdserve.bench.summary import measured

from .conftest import Deployment

TIMEOUT = 120.0
CONVERSATION = {
    "block_size": 64, "tool_tokens": 64, "system_tokens": 64,
    "requests": [
        {"t": 0, "type": "n", "in": 700, "out": 4, "hash_ids": list(range(1, 11)), "api_time": 1, "think_time": 0},
        {"t": 3, "type": "subagent", "duration_ms": 1500, "requests": [{"t": 0, "type": "n", "in": 200, "out": 4, "hash_ids": [50, 51]}]},
        {"t": 5, "type": "n", "in": 800, "out": 4, "hash_ids": list(range(1, 13)), "api_time": 1, "think_time": 0.1},
    ],
}  # fmt: skip
CHATS = [{"conversations": [{"from": "human", "value": "Name a river."}, {"from": "gpt", "value": "The Rhine."}] * 2}]
#: a few requests of a few hundred tokens each: float32 on one core computes some 250 tokens a second
SMALL = {
    "long-doc-qa": "--num-documents 1 --document-length 600 --repeat-count 1 --output-len 4",
    "multi-round-qa": "--num-users 1 --num-rounds 2 --qps 0.5 --time 0 --shared-system-prompt 100 --user-history-prompt 100 "
    "--answer-len 4",
    "chat-docs": "--num-documents 1 --document-length 300 --num-users 1 --num-rounds 2 --question-len 20 --output-len 4",
    "doc-analysis": "--num-documents 2 --document-length 100 --output-len 4",
    "rag": "--num-requests 2 --template-len 60 --chunk-len 60 --chunks-per-request 2 --output-len 4",
    "sharegpt": "--output-len 4",
    "cache-rate": "--rates 0,100 --num-requests 1 --num-prefixes 1 --prompt-len 520 --output-len 4",
    "working-set": "--working-sets 300 --document-length 300 --num-requests 1 --output-len 4",
    "random": "--num-prompts 2 --random-input-len 150 --random-output-len 4",
    "all-hit": "--num-prompts 1 --num-requests 2 --prompt-len 520 --output-len 4",
    "pd-interference": "--streams 2 --stream-prompt-len 40 --stream-output-len 24 --prefill-len 400 --num-prefills 1",
    "trace-replay": "--no-recycle --warm-prefix-pct 0.5",
}
#: requests of these repeat a prompt, or the beginning of one, of a whole chunk (256 tokens) at least
HITS = ("long-doc-qa", "chat-docs", "cache-rate", "all-hit", "trace-replay")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder: Path = tmp_path_factory.mktemp("bench")
    (folder / "traces").mkdir()
    (folder / "traces" / "a.json").write_text(json.dumps(CONVERSATION))
    (folder / "chats.json").write_text(json.dumps(CHATS))
    return {
        "sharegpt": ["--dataset-path", str(folder / "chats.json")],
        "trace-replay": ["--trace-directory", str(folder / "traces")],
    }


@pytest.mark.parametrize("name", workloads.NAMES)
def test_a_workload_runs_as_planned(pd: Deployment, files: dict[str, list[str]], name: str) -> None:
    plan = workloads.plan_of(name, [*SMALL[name].split(), *files.get(name, [])], seed=11)
    server = runner.ask(pd.target.url)
    assert server.tokens_per_word == 1.0, "every word is one token"
    runner.check_length(plan, server.max_len)
    outcome: Outcome = runner.run(plan, server, Options(server.model, seed=11, chat=plan.chat, timeout=TIMEOUT))
    steps = [step for stage in plan.stages for session in stage.sessions for step in every_step(session)]
    assert len(outcome.records) == len(steps)
    assert [r.error for r in outcome.records if not r.ok] == []
    assert sorted(r.output_tokens for r in outcome.records) == sorted(step.output_tokens for step in steps)
    if not plan.chat:  # a chat template adds tokens
        sent = {r.planned_tokens - r.prompt_tokens for r in outcome.records}
        assert sent == {0}, "a prompt has the tokens that were planned"
    assert all(r.first is not None and r.intended <= r.sent <= r.first <= r.ended for r in outcome.records)
    if name in HITS:
        assert max(r.cached_tokens or 0 for r in measured(outcome.records)) >= 256
    records_of.fill_in(server, outcome.records)
    assert {r.route for r in outcome.records} <= {"pd", "local", "cache"}

"""The scheduler's half while the daemon brings chunks up from a lower tier: it asks again, within bounds, then decides."""

import logging
import types

import pytest

from pdserve.chunk import ChunkLayout
from pdserve.errors import CacheUnavailable
from pdserve.transfer import wire

pytest.importorskip("vllm", reason="the connector's messages derive from vLLM's classes")
from pdserve.engines.vllm import finding
from pdserve.engines.vllm.messages import LoadResult, WorkerReport
from pdserve.engines.vllm.scheduler_side import SchedulerSide

BLOCK, CHUNK = 16, 32
LAYOUT = ChunkLayout(kind="opaque-block", kv_dtype="float32", layers=2, block_tokens=BLOCK, block_bytes=512, shards=1)


class Scripted:
    """A client whose lookups are answered from a list: (tiers of the chunks found, how many are loading), or an error."""

    def __init__(self, *answers):
        self.answers, self.released = list(answers), []
        self.chunk_tokens, self.connected, self.daemon_id, self.lookups = CHUNK, True, "d", 0
        self.content = ("d", 0)

    def connect(self, timeout=0):
        pass

    def lookup(self, keys, timeout, prefill_speed=0.0):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            raise CacheUnavailable("slow")
        self.lookups += 1
        tiers, loading = answer
        found = [wire.Found(i * 8192, CHUNK, 2048, 4096, [i], tier) for i, tier in enumerate(tiers)]
        return wire.LookupReply(1, self.lookups if found else 0, found, 0, loading)

    def release_soon(self, lease, *rest):
        self.released.append(lease)

    def close(self):
        pass


def request(chunks=4):
    tokens = list(range(chunks * CHUNK))
    return types.SimpleNamespace(
        request_id="r", prompt_token_ids=tokens, all_token_ids=tokens, num_prompt_tokens=len(tokens), num_tokens=len(tokens),
        kv_transfer_params=None, lora_request=None, cache_salt=None, mm_features=[],
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(finding, "POLL_S", 0.0)


def side(client):
    return SchedulerSide(client, LAYOUT, "f", workers=1, instance="both-0")


def test_while_chunks_are_coming_the_request_is_asked_for_again_and_no_lease_is_kept():
    client = Scripted((["dram"], 3), (["dram", "disk"], 2), (["dram", "disk", "disk", "disk"], 0))
    s = side(client)
    assert s.matched(request(), 0) == (None, False)
    assert s.matched(request(), 0) == (None, False)
    assert client.released == [1, 2]
    assert s.matched(request(), 0) == (4 * CHUNK, True)
    assert client.released == [1, 2]


def test_what_does_not_come_after_all_is_computed():
    s = side(Scripted(([], 4), (["disk"], 0)))
    assert s.matched(request(), 0) == (None, False)
    assert s.matched(request(), 0) == (CHUNK, True)


def test_a_tier_that_stalls_is_not_waited_for(monkeypatch, caplog):
    monkeypatch.setattr(finding, "FETCH_STALL_S", 0.05)
    s = side(Scripted((["disk"], 3)))
    answers = [s.matched(request(), 0)]
    while answers[-1][0] is None:
        assert len(answers) < 100_000
        answers.append(s.matched(request(), 0))
    assert answers[-1] == (CHUNK, True)
    assert len(answers) > 2
    assert s.matched(request(), 0) == (CHUNK, True)


def test_steady_arrival_is_waited_for_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(finding, "FETCH_MAX_S", 0.05)
    s = side(Scripted(([], 9)))
    first = s.matched(request(), 0)
    assert first == (None, False)
    while (answer := s.matched(request(), 0))[0] is None:
        pass
    assert answer == (0, False)


def test_a_daemon_that_is_lost_meanwhile_is_a_miss_at_once():
    s = side(Scripted(([], 4), None))
    assert s.matched(request(), 0) == (None, False)
    assert s.matched(request(), 0) == (0, False)


def test_the_log_line_names_the_tiers(caplog):
    logging.getLogger("pdserve").propagate = True
    s = side(Scripted((["dram", "disk", "disk", "disk"], 0)))
    r = request()
    count, _ = s.matched(r, 0)
    s.allocated(r, list(range(8)), count)
    loaded = WorkerReport({}, {"r": LoadResult(4, 8192, 0.01, filled=4)})
    report = types.SimpleNamespace(kv_connector_worker_meta=loaded, finished_recving={"r"})
    with caplog.at_level("INFO"):
        s.reported(report)
    assert "retrieved 128 of 128 tokens from dram+disk in 10.0 ms request_id=r" in caplog.text

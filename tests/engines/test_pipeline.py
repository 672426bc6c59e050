"""A pipeline of two stages: one scheduler's half, a worker's half for each stage, a real cache daemon, and vLLM's own aggregator
between them. The stages run apart, as in vLLM, which has several steps under way: the first may be steps ahead of the second."""

import os
import secrets
import threading
import time
import types
from collections import deque
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs an engine's environment")
pytest.importorskip("vllm", reason="needs an engine's environment")
from running_cache import RunningCache  # noqa: E402
from scheduler_output import step  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator  # noqa: E402
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput  # noqa: E402

from pdserve.chunk import INT8, KeyChain, root_key  # noqa: E402
from pdserve.engines.vllm import copier, layout, loading, saving, stages  # noqa: E402
from pdserve.engines.vllm.scheduler_side import SchedulerSide  # noqa: E402
from pdserve.engines.vllm.worker_side import WorkerSide  # noqa: E402
from pdserve.transfer.client import CacheClient  # noqa: E402

LAYERS, HEADS, HEAD, BLOCK, BLOCKS, CHUNK = 4, 2, 16, 64, 16, 256
PATIENCE_S = 60
PROMPT = list(range(1000, 1600))  # two chunks and a tail


def request(rid, tokens):
    return types.SimpleNamespace(
        request_id=rid, prompt_token_ids=list(tokens), all_token_ids=list(tokens), num_prompt_tokens=len(tokens),
        num_tokens=len(tokens), kv_transfer_params=None, lora_request=None, cache_salt=None, mm_features=[],
        status=types.SimpleNamespace(name="FINISHED_ABORTED"),
    )  # fmt: skip


def names(start, end):
    return [f"model.layers.{i}.self_attn.attn" for i in range(start, end)]


class Engine:
    """As many workers as stages x tensor parallel size, with blocks in host memory, and one scheduler."""

    def __init__(self, socket, name, stages_, tp=1, groups=2, payload="", *, model):
        self.stages, self.tp, self.model = stages_, tp, model
        specs = pytest.importorskip("vllm.v1.kv_cache_interface")
        spec = specs.FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS // tp, head_size=HEAD, dtype=torch.float32)
        self.kv, self.workers = [], []
        for rank in range(stages_ * tp):
            vllm_config, kv_config = self._configs(spec, rank)
            self.layout = layout.chunk_layout(vllm_config, kv_config, payload, groups)
            caches = {
                n: torch.zeros(BLOCKS, HEADS // tp, BLOCK, 2 * HEAD) for n in kv_config.kv_cache_groups[0].layer_names
            }
            self.kv.append(caches)
            side = WorkerSide(CacheClient(socket, f"{name}/worker-{rank}"), shards=self.layout.shards, writer=name)
            side.register(layout.pages(caches, vllm_config, kv_config, self.layout, rank))
            self.workers.append(side)
        self.client = CacheClient(socket, f"{name}/scheduler")
        self.client.connect(PATIENCE_S)
        self.side = SchedulerSide(
            self.client, self.layout, model, workers=stages.workers(vllm_config), instance=name, mode="always", patience=1000
        )
        self.side.check_chunk_tokens(CHUNK)
        self.aggregator = KVOutputAggregator(stages_ * tp)
        self.behind = [deque() for _ in self.workers]  # plans that a worker has not come to

    def _configs(self, spec, rank):
        stage = rank // self.tp
        mine = names(*(n * LAYERS // self.stages for n in (stage, stage + 1)))
        vllm_config = types.SimpleNamespace(
            parallel_config=types.SimpleNamespace(
                tensor_parallel_size=self.tp, pipeline_parallel_size=self.stages, rank=rank,
                distributed_executor_backend="mp",
            ),
            device_config=types.SimpleNamespace(device_type="cpu"),
            model_config=types.SimpleNamespace(
                get_total_num_kv_heads=lambda: HEADS, get_total_num_hidden_layers=lambda: LAYERS
            ),
        )  # fmt: skip
        group = types.SimpleNamespace(kv_cache_spec=spec, layer_names=mine)
        kv_config = types.SimpleNamespace(kv_cache_groups=[group], num_blocks=BLOCKS)
        layout.check_supported(vllm_config, kv_config)
        return vllm_config, kv_config

    def blocks(self):
        """[layer][block, head, ...] of the whole model."""
        rows = []
        for stage in range(self.stages):
            ranks = self.kv[stage * self.tp : (stage + 1) * self.tp]
            rows += [torch.cat([caches[name] for caches in ranks], dim=1) for name in ranks[0]]
        return torch.stack(rows)

    def compute(self, rank, content):
        """What this worker's layers and heads are of the model's `content`."""
        stage, tp_rank = divmod(rank, self.tp)
        heads = HEADS // self.tp
        for i, (_, cache) in enumerate(self.kv[rank].items(), stage * LAYERS // self.stages):
            cache.copy_(content[i][:, tp_rank * heads : (tp_rank + 1) * heads])

    def run(self, rank, content=None):
        """One worker takes its next plan: the step's loads begin, it computes, its saves begin; then it answers."""
        plan, worker = self.behind[rank].popleft(), self.workers[rank]
        worker.before_overwrite(plan)
        worker.start_loads(plan)
        if content is not None:
            self.compute(rank, content)
        if not plan.idle:
            worker.start_saves(plan)
        sent, received, blocks = worker.finished()
        said = KVConnectorOutput(sent, received, kv_connector_worker_meta=worker.report(), invalid_block_ids=blocks)
        return ModelRunnerOutput([], {}, kv_connector_output=said)

    def schedule(self, **kw):
        plan = self.side.plan(step(**kw))
        for queue in self.behind:
            queue.append(plan)
        return plan

    def collect(self, outputs):
        found = self.aggregator.aggregate(outputs).kv_connector_output
        self.side.reported(found)
        return found

    def idle_until(self, what):
        """Steps that compute nothing, until their outputs say so."""
        until = time.monotonic() + PATIENCE_S
        sent, received, blocks = set(), set(), set()
        while not what(sent, received, blocks):
            assert time.monotonic() < until, (sent, received, blocks)
            self.schedule(scheduled={})
            found = self.collect([self.run(rank) for rank in range(len(self.workers))])
            sent |= found.finished_sending or set()
            received |= found.finished_recving or set()
            blocks |= found.invalid_block_ids
        return blocks

    def store(self, rid, prompt, ids, content):
        """Computes and stores all of it, and ends; the answer once all blocks may go."""
        r = request(rid, prompt)
        assert self.side.matched(r, 0) == (0, False)
        self.side.allocated(r, ids, 0)
        self.schedule(scheduled={rid: len(prompt)}, new=[(rid, 0)])
        outputs = [self.run(rank, content) for rank in range(len(self.workers))]
        keeps = self.side.finished(r)
        self.collect(outputs)
        if keeps:
            self.idle_until(lambda sent, received, blocks: rid in sent)

    def load(self, rid, prompt, ids):
        """Loads what is there; (tokens, blocks that were not filled)."""
        r = request(rid, prompt)
        tokens, later = self.side.matched(r, 0)
        assert later, "nothing was found"
        self.side.allocated(r, ids, tokens)
        blocks = self.idle_until(lambda sent, received, blocks: rid in received)
        self.side.finished(r)
        return tokens, blocks

    def close(self):
        for worker in self.workers:
            worker.close()
        self.side.close()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """One for all tests: each has keys of its own."""
    running = RunningCache(tmp_path_factory.mktemp("pipeline"), f"test-{os.getpid()}-{time.monotonic_ns()}")
    yield running
    running.stop()
    Path(f"/dev/shm/pdserve-{running.name}.arena").unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """A daemon that gets no processor for a while is slow and not gone."""
    for module in (copier, loading, saving):
        monkeypatch.setattr(module, "RPC_S", PATIENCE_S)


@pytest.fixture
def engines(daemon):
    made, model = [], secrets.token_hex(8)

    def make(name, *args, **kw):
        made.append(Engine(daemon.socket, f"{name}-{model}", *args, **{"model": model, **kw}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
    until = time.monotonic() + PATIENCE_S
    while left := [t.name for t in threading.enumerate() if t.name.startswith("pdserve-")]:
        assert time.monotonic() < until, left
        time.sleep(0.02)
    while (status := daemon.status())["leases"] or status["reservations"]:
        assert time.monotonic() < until, f"left in the cache: {status}"
        time.sleep(0.02)


def content():
    return torch.randn(LAYERS, BLOCKS, HEADS, BLOCK, 2 * HEAD)


def chunks(engine, prompt):
    """(bytes, digests) of the prompt's chunks that are visible."""
    chain = KeyChain(root_key(engine.model, engine.layout), CHUNK)
    reply = engine.client.lookup([*chain.full(prompt), chain.tail(prompt)], PATIENCE_S)
    arena = engine.client.arena.bytes
    found = [
        (np.stack([arena[f.offset + i * f.stride :][: f.shard_bytes] for i in range(len(f.digests))]), f.digests)
        for f in reply.found
    ]
    engine.client.release(reply.lease, PATIENCE_S)
    return found


IDS = [3, 1, 4, 15, 9, 2, 6, 5, 8, 7]
TO = [0, 2, 14, 3, 5, 8, 9, 7, 10, 11]


def test_two_stages_store_what_one_worker_with_all_layers_stores(engines):
    whole = content()
    one, two = engines("one", 1), engines("two", 2, model="other keys")
    assert one.layout == two.layout
    one.store("a", PROMPT, IDS, whole)
    two.store("b", PROMPT, IDS, whole)
    want, got = chunks(one, PROMPT), chunks(two, PROMPT)
    assert len(want) == len(got) == 3
    assert [d for _, d in got] == [d for _, d in want]
    assert all((a == b).all() for (a, _), (b, _) in zip(got, want, strict=True))


#: (stages, tensor parallel size) of who stores and of who loads, and the payload
WAYS = [
    ((2, 1), (1, 1), ""),
    ((1, 1), (2, 1), ""),
    ((2, 1), (2, 1), ""),
    ((2, 2), (1, 2), ""),
    ((1, 2), (2, 1), ""),
    ((2, 1), (1, 1), INT8),
]


@pytest.mark.parametrize(("first", "second", "payload"), WAYS, ids=[f"{a} to {b} {p}" for a, b, p in WAYS])
def test_what_some_stages_store_others_load(engines, first, second, payload):
    whole = content()
    writer, reader = engines("w", *first, payload=payload), engines("r", *second, payload=payload)
    writer.store("a", PROMPT, IDS, whole)
    before = reader.blocks()
    tokens, unfilled = reader.load("b", PROMPT, TO)
    assert (tokens, unfilled) == (len(PROMPT), set())
    got = reader.blocks()
    others = [b for b in range(BLOCKS) if b not in TO]
    assert torch.equal(got[:, others], before[:, others])
    if payload:
        assert torch.allclose(got[:, TO], whole[:, IDS], atol=0.1)
    else:
        assert torch.equal(got[:, TO], whole[:, IDS])
    # What was loaded is what was stored, down to the digests.
    stored = chunks(writer, PROMPT)
    reader.store("c", [1, *PROMPT], TO, got)
    again = chunks(reader, [1, *PROMPT])
    assert [d for _, d in again][:2] == [d for _, d in stored][:2]


def test_a_chunk_is_visible_only_when_the_last_stage_has_stored_it_and_blocks_stay_until_then(engines):
    whole = content()
    two = engines("two", 2)
    r = request("a", PROMPT)
    two.side.matched(r, 0)
    two.side.allocated(r, IDS, 0)
    # Two steps of one prompt are under way: the first stage has computed both before the second begins with the first.
    two.schedule(scheduled={"a": 300}, new=[("a", 0)])
    two.schedule(scheduled={"a": 300}, cached=[("a", None, 300)])
    outputs = [two.run(0, whole), two.run(0)]
    until = time.monotonic() + PATIENCE_S
    while two.workers[0]._saver.outstanding("a"):
        assert time.monotonic() < until
        time.sleep(0.005)
    assert chunks(two, PROMPT) == []
    # The answer's last token is known, say because the client has left; the second stage is still at it.
    assert two.side.finished(r) is True
    two.collect([outputs[0], two.run(1, whole)])
    two.collect([outputs[1], two.run(1)])
    two.idle_until(lambda sent, received, blocks: "a" in sent)
    assert len(chunks(two, PROMPT)) == 3
    assert two.side._requests == {}


def test_a_stage_whose_part_is_damaged_fails_the_load_for_all(engines):
    whole = content()
    one, two = engines("one", 1), engines("two", 2)
    one.store("a", PROMPT, IDS, whole)
    chain = KeyChain(root_key(one.model, one.layout), CHUNK)
    reply = one.client.lookup(chain.full(PROMPT), PATIENCE_S)
    hit = reply.found[1]
    one.client.arena.bytes[hit.offset + 2 * hit.stride + 5] ^= 1  # the second group's first head
    one.client.release(reply.lease, PATIENCE_S)
    _, unfilled = two.load("b", PROMPT, TO)
    assert unfilled == set(TO[4:])  # the first chunk stays good
    assert torch.equal(two.blocks()[:, TO[:4]], whole[:, IDS[:4]])
    assert len(chunks(two, PROMPT)) == 1  # the damaged one was dropped


def test_a_preemption_between_the_stages_stores_nothing_wrong(engines):
    """When the first stage has stored, and before the second has come to it: its blocks go to somebody else."""
    whole, others = content(), content()
    two = engines("two", 2)
    r = request("a", PROMPT)
    two.side.matched(r, 0)
    two.side.allocated(r, IDS, 0)
    two.schedule(scheduled={"a": 600}, new=[("a", 0)])
    outputs = [[two.run(0, whole)], []]
    two.schedule(scheduled={}, preempted=["a"])
    outputs[0].append(two.run(0))
    two.kv[0].update({name: cache.copy_(others[i]) for i, (name, cache) in enumerate(two.kv[0].items())})
    outputs[1] += [two.run(1, whole), two.run(1)]
    two.compute(1, others)
    for pair in zip(*outputs, strict=True):
        two.collect(list(pair))
    two.side.finished(r)
    two.idle_until(lambda sent, received, blocks: not two.side._requests)
    for nth, (stored, _) in enumerate(chunks(two, PROMPT)):
        want = whole[:, IDS[nth * 4 : nth * 4 + 4]].permute(2, 0, 1, 3, 4)  # head, layer, block
        halves = [want[:, :2], want[:, 2:]]
        for shard, row in enumerate(stored):
            assert (row == halves[shard // HEADS][shard % HEADS].contiguous().view(torch.uint8).reshape(-1).numpy()).all()

"""What the scheduler's half of the connector and the workers' half tell each other. vLLM carries these between its processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata


@dataclass
class ChunkSave:
    key: bytes
    parent: bytes
    tokens: int
    block_ids: list[int]


@dataclass
class SaveJob:
    """Chunks of one request that are complete once this step has run."""

    request_id: str
    chunks: list[ChunkSave]
    tag: bytes = b""  # whose it is (chunk.tenant_tag)


@dataclass
class ChunkLoad:
    key: bytes
    offset: int
    tokens: int
    shard_bytes: int
    stride: int
    digests: list[int]
    #: one per engine block of the chunk; None where the engine has that block already
    block_ids: list[int | None]


@dataclass
class ChunkExpected:
    """A chunk that a producer is still writing."""

    key: bytes
    tokens: int
    block_ids: list[int | None]


@dataclass
class LoadJob:
    """Chunks under a lease, to be copied into the request's blocks, and those after them that are still to come."""

    request_id: str
    daemon_id: str
    chunks: list[ChunkLoad]
    expected: list[ChunkExpected] = field(default_factory=list)
    #: how long to wait for the next one of `expected`
    stall_s: float = 0.0


@dataclass
class StepPlan(KVConnectorMetadata):
    """Scheduler to workers, once a step."""

    loads: list[LoadJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)
    #: finished requests whose blocks are kept until their saves are done: report them when they are
    awaiting: set[str] = field(default_factory=set)
    preempted: set[str] = field(default_factory=set)
    #: requests that ended while they were being loaded: no need to wait for chunks that are still to come
    dropped: set[str] = field(default_factory=set)
    #: answers whose next token somebody waits for in this step, and would see it come later
    answers: int = 0
    #: whether this step computes nothing at all
    idle: bool = False


@dataclass
class LoadResult:
    #: of the job's `chunks`: read and verified; the late ones' readers tell the daemon themselves
    chunks: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    corrupt: list[bytes] = field(default_factory=list)
    error: str = ""
    #: chunks in their blocks, from the first one on without a gap, late ones included
    filled: int = 0
    #: the tiers that the late ones came from
    late: list[str] = field(default_factory=list)

    def merged(self, other: LoadResult) -> LoadResult:
        """Two ranks' results for one request: they load side by side, so time is the slower one's, and bytes add up."""
        return LoadResult(
            max(self.chunks, other.chunks),
            self.nbytes + other.nbytes,
            max(self.seconds, other.seconds),
            self.corrupt + other.corrupt,
            self.error or other.error,
            min(self.filled, other.filled),
            max(self.late, other.late, key=len),
        )


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """Workers to scheduler, once a step; vLLM adds up the ranks' reports."""

    #: save jobs done, by request
    saved: dict[str, int] = field(default_factory=dict)
    loaded: dict[str, LoadResult] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReport:
        assert isinstance(other, WorkerReport)
        saved = dict(self.saved)
        for request_id, count in other.saved.items():
            saved[request_id] = saved.get(request_id, 0) + count
        loaded = dict(self.loaded)
        for request_id, other_result in other.loaded.items():
            mine = loaded.get(request_id)
            loaded[request_id] = other_result if mine is None else mine.merged(other_result)
        return WorkerReport(saved, loaded)

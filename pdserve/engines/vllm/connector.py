"""The KV connector that vLLM loads (`kv_connector_module_path: pdserve.engines.vllm.connector`): hands each call to one of two halves.

vLLM makes one of these in its scheduler and one in each worker. An exception that leaves a worker-side call kills the
engine, so those calls are fenced: it is logged, and the request's tokens are computed instead.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from vllm import __version__ as vllm_version
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from pdserve import log
from pdserve.chunk import AS_IS
from pdserve.engines.vllm import detokenizing, finding, giving_way, layout, naps, quick, stages, versions
from pdserve.engines.vllm.facts import Teller
from pdserve.engines.vllm.messages import StepPlan
from pdserve.engines.vllm.scheduler_side import SchedulerSide
from pdserve.engines.vllm.stats import PromStats, Stats
from pdserve.engines.vllm.worker_side import WorkerSide
from pdserve.errors import CacheError, ConfigError
from pdserve.transfer.client import CacheClient

T = TypeVar("T")
Results = tuple[set[str], set[str], set[int]]
Match = tuple[int | None, bool]


class PdserveConnector(KVConnectorBase_V1):
    """Saves every computed chunk to the host's cache daemon and loads what is there, asynchronously both ways."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log.setup("engine", vllm_config.kv_transfer_config.get_from_extra_config("pdserve.instance", ""))
        versions.check(vllm_version)
        detokenizing.install()  # where engine and client's end are one process; build_prom_metrics() where they are not
        layout.check_supported(vllm_config, kv_cache_config)
        self._log = log.get("connector")
        self._vllm_config, self._config = vllm_config, kv_cache_config
        transfer = vllm_config.kv_transfer_config
        payload = transfer.get_from_extra_config("pdserve.payload", AS_IS)
        groups = transfer.get_from_extra_config("pdserve.layer_groups", 1)
        self._layout = layout.chunk_layout(vllm_config, kv_cache_config, payload, groups)
        socket = transfer.get_from_extra_config("pdserve.socket", None)
        if not socket:
            raise ConfigError(
                "kv_connector_extra_config.pdserve.socket", "is missing", "Give the path of the cache daemon's socket."
            )
        instance = transfer.get_from_extra_config("pdserve.instance", "") or f"engine-{transfer.engine_id}"
        workers = stages.workers(vllm_config)
        self._rank = vllm_config.parallel_config.rank % workers
        self._failed_blocks: set[int] = set()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            naps.install()
            fingerprint = layout.model_fingerprint(
                vllm_config, transfer.get_from_extra_config("pdserve.model_fingerprint", "")
            )
            client = CacheClient(socket, f"{instance}/scheduler")
            mode = transfer.get_from_extra_config("pdserve.load", "adaptive")
            if mode not in finding.MODES:
                fix = f"Use one of {', '.join(finding.MODES)}."
                raise ConfigError("kv_connector_extra_config.pdserve.load", f"{mode!r} is no way to load", fix)
            patience = transfer.get_from_extra_config("pdserve.patience", 1.0)
            if not isinstance(patience, int | float) or not 1 <= patience <= 1000:
                fix = "Use a number from 1 to 1000."
                raise ConfigError("kv_connector_extra_config.pdserve.patience", f"{patience!r} is no factor", fix)
            self._scheduler = SchedulerSide(
                client, self._layout, fingerprint, workers=workers, instance=instance, mode=mode, patience=float(patience),
                teller=Teller(socket, instance), max_model_len=vllm_config.model_config.max_model_len,
                plain_chats=not vllm_config.structured_outputs_config.reasoning_parser,
            )  # fmt: skip
            self._connect(client)
            self._log.info("%s: role %s, model %s, layout %s", instance, transfer.kv_role, fingerprint, self._layout)
        else:
            # The engine id is the same in all ranks of one engine and in no other engine.
            writer = str(transfer.engine_id or uuid.uuid4().hex)
            self._worker = WorkerSide(
                CacheClient(socket, f"{instance}/worker-{self._rank}"), shards=self._layout.shards, writer=writer,
                teller=Teller(socket, instance) if self._rank == 0 else None,
                load_share=giving_way.load_share(transfer.get_from_extra_config("pdserve.load_share", None)),
            )  # fmt: skip

    def _connect(self, client: CacheClient) -> None:
        try:
            client.connect()
        except CacheError:
            return  # the client has warned once; it connects when the daemon is there
        assert self._scheduler is not None
        self._scheduler.check_chunk_tokens(client.chunk_tokens)

    def _fenced(self, what: str, call: Callable[[], T], instead: T) -> T:
        try:
            return call()
        except Exception:  # noqa: BLE001 - the border to the engine
            self._log.exception("%s failed; the engine goes on without it", what)
            return instead

    @property
    def requires_kv_delivery(self) -> bool:
        # A handover that is lost is computed by the consumer: never a reason to recompute on the producer.
        return False

    # ---- workers ----

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        assert self._worker is not None
        transfer, device = self._vllm_config.kv_transfer_config, next(iter(kv_caches.values())).device
        # Here, because no other thread may make a context while graphs are captured.
        self._worker.register(
            layout.pages(kv_caches, self._vllm_config, self._config, self._layout, self._rank),
            quick.on(device, transfer.get_from_extra_config("pdserve.second_context", None), transfer.kv_role),
        )

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        worker, plan = self._worker, self._plan()
        if worker is not None and plan is not None:
            self._fenced("starting loads", lambda: worker.start_loads(plan), None)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: a request runs only after its load has ended."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Whole steps are saved, after they ran."""

    def wait_for_save(self) -> None:
        worker, plan = self._worker, self._plan()
        if worker is not None and plan is not None:
            self._fenced("starting saves", lambda: worker.start_saves(plan), None)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None and isinstance(kv_connector_metadata, StepPlan):
            self._worker.before_overwrite(kv_connector_metadata)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        assert self._worker is not None
        nothing: Results = (set(), set(), set())
        sent, received, blocks = self._fenced("collecting results", self._worker.finished, nothing)
        # By block and not by request (which newer vLLM has, too): what was loaded before the failure stays good.
        self._failed_blocks |= blocks
        return sent, received

    def get_block_ids_with_load_errors(self) -> set[int]:
        blocks, self._failed_blocks = self._failed_blocks, set()
        return blocks

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        worker = self._worker
        return self._fenced("reporting", worker.report, None) if worker is not None else None

    def _plan(self) -> StepPlan | None:
        plan = self._connector_metadata
        return plan if isinstance(plan, StepPlan) else None

    # ---- scheduler ----

    def on_new_request(self, request: Any) -> None:
        scheduler = self._scheduler
        assert scheduler is not None
        self._fenced("prefetching", lambda: scheduler.arrived(request), None)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Match:
        scheduler = self._scheduler
        assert scheduler is not None
        miss: Match = (0, False)
        return self._fenced("looking up", lambda: scheduler.matched(request, num_computed_tokens), miss)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._scheduler is not None
        self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        assert self._scheduler is not None
        return self._scheduler.plan(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        scheduler = self._scheduler
        assert scheduler is not None
        self._fenced("taking the workers' report", lambda: scheduler.reported(connector_output), None)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        scheduler = self._scheduler
        assert scheduler is not None
        params = self._fenced("handing over", lambda: scheduler.handover(request), None)
        # Not fenced: to free blocks that are still being copied would store wrong bytes under a right key.
        return scheduler.finished(request), params

    def reset_cache(self) -> bool | None:
        """vLLM calls it with reset_external, before it sleeps, and when weights are updated."""
        scheduler = self._scheduler
        if scheduler is None:
            return None

        def reset() -> bool:
            scheduler.reset()
            return True

        return self._fenced("resetting", reset, False)

    def take_events(self) -> Iterable[Any]:
        return ()

    # ---- what vLLM shows at /metrics ----

    def get_kv_connector_stats(self) -> Any:
        return self._fenced("counting", self._scheduler.stats.take, None) if self._scheduler is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        return Stats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> Any:
        detokenizing.install()  # this is called in the process that makes text of tokens
        return PromStats(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- both ----

    def shutdown(self) -> None:
        for half in (self._worker, self._scheduler):
            if half is not None:
                self._fenced("closing", half.close, None)

"""All checks, in the order in which they are told. Heavy modules are imported by the check that needs them."""

from __future__ import annotations

from pdserve.doctor import deployment, engine, gpu, kernel, live, machine, memory, network, prompts, storage, transport
from pdserve.doctor.runner import Check

CHECKS: tuple[Check, ...] = (
    Check("gpu", gpu.check, gpu.DEADLINE),
    Check("vllm", engine.check, engine.DEADLINE),
    Check("kernels", kernel.check, kernel.DEADLINE),
    Check("model", machine.model),
    Check("cores", machine.cores),
    Check("memory", machine.memory),
    Check("run directory", machine.folder),
    Check("shared memory", memory.shared_memory),
    Check("leftovers", memory.leftovers),
    Check("huge pages", memory.huge_pages),
    Check("memory lock", memory.memory_lock),
    Check("numa", memory.numa),
    Check("ucx", transport.check, transport.DEADLINE),
    Check("ports", network.ports),
    Check("hosts", network.hosts, 30.0),
    Check("clocks", network.clocks, 20.0),
    Check("tiers", storage.tiers, storage.TIER_DEADLINE),
    Check("processes", deployment.processes),
    Check("cache", deployment.cache, 15.0),
    Check("prompts", prompts.check, prompts.DEADLINE),
    # These measure, one after the other, with nothing else of ours beside them.
    Check("disk", storage.disk, storage.DISK_DEADLINE, alone=True),
    Check("hit test", live.hits, live.HITS_DEADLINE, alone=True),
    Check("break-even", live.break_even, live.BREAK_EVEN_DEADLINE, alone=True),
)

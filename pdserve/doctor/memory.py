"""Shared memory against the arena, leftovers in it, huge pages, the memory lock limit, NUMA."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.deploy import plan as plans
from pdserve.deploy import preflight
from pdserve.doctor.finding import Finding, fail, ok, skip, warn
from pdserve.doctor.subject import Subject
from pdserve.errors import ConfigError
from pdserve.transfer import arena

SHM, LEFTOVERS, HUGE, LOCK, NUMA = "shared memory", "leftovers", "huge pages", "memory lock", "numa"
GIB = 1 << 30
#: below this arena size, page tables and pinning cost too little to speak of
LARGE_ARENA = 32 * GIB


def shared_memory(subject: Subject) -> Iterator[Finding]:
    try:
        free = preflight.shm_free()
    except ConfigError as error:
        yield fail(SHM, error.problem, "The cache keeps KV in shared memory and cannot start.", error.fix)
        return
    top = subject.topology
    size = top.cache.size if top and top.cache else None
    old = plans.arena_file(subject.plan.label) if subject.plan else None
    ours = old.stat().st_blocks * 512 if old and old.exists() else 0
    yield judge_shared_memory(free, size, ours)


def judge_shared_memory(free: int, size: int | None, ours: int) -> Finding:
    text = f"{preflight.SHM}: {preflight.gib(free)} free"
    if size is None:
        return ok(SHM, text) if free >= GIB else warn(SHM, text, "There is little room for a cache.", _remount(4 * GIB))
    if size > free + ours:
        means = f"The arena needs cache.size = {preflight.gib(size)} there, in full, at start."
        return fail(SHM, text, means, f"Lower cache.size, or enlarge it: {_remount(size * 5 // 4)}")
    held = f", {preflight.gib(ours)} of it this deployment's" if ours else ""
    return ok(SHM, f"{text}{held}; cache.size {preflight.gib(size)} fits")


def _remount(size: int) -> str:
    return f"mount -o remount,size={-(-size // GIB)}g /dev/shm (in a container: --shm-size)"


def leftovers(subject: Subject) -> Iterator[Finding]:
    found = {path: path.stat().st_blocks * 512 for path in preflight.SHM.glob("pdserve-*") if path.is_file()}
    yield judge_leftovers({str(p): size for p, size in found.items()}, mapped())


def judge_leftovers(files: dict[str, int], in_use: Iterable[str]) -> Finding:
    used = set(in_use)
    # A journal, or the one that is to take its place, belongs to the arena beside it.
    arena_of = {p: p.removesuffix(".new").replace(".journal", ".arena") for p in files}
    left = {p: size for p, size in files.items() if p not in used and arena_of[p] not in used}
    if not left:
        return ok(LEFTOVERS, "none in /dev/shm" if not files else f"none; {len(files)} files in use")
    names = ", ".join(sorted(Path(p).name for p in left))
    means = "Nobody uses this memory: a deployment was killed. Its next start removes it, or finds its chunks again."
    size = preflight.gib(sum(left.values()))
    return warn(LEFTOVERS, f"{size}: {names}", means, f"pdserve stop NAME, or rm {' '.join(sorted(left))}")


def mapped() -> set[str]:
    """Files in /dev/shm that some process of ours has mapped."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text().splitlines()
        except OSError:
            continue  # it ended, or is another user's, whose files are not ours to judge either
        found |= {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line}
    return found


# --- huge pages, locks, NUMA --------------------------------------------------------------------------------------


def huge_pages(subject: Subject) -> Iterator[Finding]:
    setting = _read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = setting.partition("[")[2].partition("]")[0] or "unknown"
    try:
        refused = arena.huge_page_trial()
    except OSError as error:
        yield skip(HUGE, f"/dev/shm has no room to try one ({error})")
        return
    top = subject.topology
    yield judge_huge_pages(refused, chosen, top.cache.size if top and top.cache else 0)


def judge_huge_pages(refused: int, setting: str, size: int) -> Finding:
    """`refused`: the errno with which the kernel answered to whoever asked for one."""
    if not refused:
        return ok(HUGE, f"given to the arena, which asks for them (shmem_enabled: {setting})")
    text = f"none for the arena: {os.strerror(refused)} (shmem_enabled: {setting})"
    if size < LARGE_ARENA:
        return ok(HUGE, f"{text}; small ones are enough for an arena of this size" if size else text)
    means = f"An arena of {preflight.gib(size)} is {size >> 12} pages: starting, mapping and pinning it takes longer."
    return warn(HUGE, text, means, _how_to_get_huge_pages(refused, setting))


def _how_to_get_huge_pages(refused: int, setting: str) -> str:
    if setting == "deny":
        return "echo never > /sys/kernel/mm/transparent_hugepage/shmem_enabled (deny forbids also what is asked for)"
    if refused in (errno.ENOMEM, errno.EBUSY, errno.EAGAIN):
        return "Memory is in pieces, or the control group's limit is near: echo 1 > /proc/sys/vm/compact_memory, then start."
    return "Linux 6.1 or newer gives them on request; before: mount -o remount,huge=within_size /dev/shm"


def memory_lock(subject: Subject) -> Iterator[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    top = subject.topology
    yield judge_memory_lock(limit, top.cache.size if top and top.cache else 0, rdma_devices())


def judge_memory_lock(limit: int, arena: int, rdma: Sequence[str]) -> Finding:
    text = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit >> 10} KiB"
    if limit == resource.RLIM_INFINITY or not rdma:
        return ok(LOCK, text if rdma else f"{text}; only RDMA needs it, and there is no RDMA device")
    if limit >= arena > 0:
        return ok(LOCK, f"{text}, the arena fits")
    means = f"An RDMA device ({', '.join(rdma)}) must lock what it reads: registering the arena will be refused."
    fix = "ulimit -l unlimited (for good: memlock in /etc/security/limits.conf, LimitMEMLOCK=infinity, --ulimit memlock=-1)"
    return warn(LOCK, text, means, fix)


def rdma_devices() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))


@dataclass(frozen=True)
class Node:
    number: int
    cores: tuple[int, ...]


def numa(subject: Subject) -> Iterator[Finding]:
    nodes = []
    for folder in sorted(Path("/sys/devices/system/node").glob("node[0-9]*")):
        cores = _read(folder / "cpulist").strip()
        nodes.append(Node(int(folder.name[4:]), tuple(plans.expand_cores(cores))))
    pinned = {}
    if subject.topology:
        pinned = {i.name: plans.expand_cores(i.cpus) for i in subject.topology.instances if i.cpus}
    yield judge_numa(nodes, pinned)


def judge_numa(nodes: Sequence[Node], pinned: dict[str, list[int]]) -> Finding:
    if len(nodes) <= 1:
        return ok(NUMA, "one node") if nodes else skip(NUMA, "this kernel does not say")
    home = {core: node.number for node in nodes for core in node.cores}
    for name, cores in pinned.items():
        spread = sorted({home[core] for core in cores if core in home})
        if len(spread) > 1:
            means = f"{name} computes on cores of nodes {spread}: half of its memory is the far one's, and slower."
            example = ",".join(str(core) for core in cores if home.get(core) == spread[0])
            return warn(NUMA, f"{len(nodes)} nodes", means, f'Give it cores of one node, e.g. cpus: "{example}"')
    listed = ", ".join(f"{node.number}: {len(node.cores)} cores" for node in nodes)
    return ok(NUMA, f"{len(nodes)} nodes ({listed})")


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""

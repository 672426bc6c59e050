"""Disk: how fast, how full against the cap. Remote tiers: does each take a chunk, give it back and forget it?"""

from __future__ import annotations

import mmap
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pdserve import env, kernels
from pdserve.chunk import FORMAT_VERSION, KEY_BYTES
from pdserve.deploy import preflight
from pdserve.doctor.finding import Finding, fail, ok, skip, warn
from pdserve.doctor.subject import Subject
from pdserve.errors import CacheError, ConfigError
from pdserve.transfer.tiers import registry
from pdserve.transfer.tiers.base import ChunkRecord, Tier

DISK, TIER = "disk", "tier"
DISK_DEADLINE, TIER_DEADLINE = 15.0, 30.0
SLOW = 200e6  # bytes a second
_PIECE = 4 << 20
_MOST = 64 << 20
_SECONDS = 1.0  # for each of writing and reading
_SPARE = 512 << 20
_TIER_SECONDS = 5.0
_SHARD = 4096


@dataclass(frozen=True)
class Speed:
    """Bytes a second with O_DIRECT (`direct`) or through the page cache where that is refused."""

    write: float
    read: float
    direct: bool


def disk(subject: Subject) -> Iterator[Finding]:
    top, plan = subject.topology, subject.plan
    tier = top.cache.disk if top and top.cache else None
    folder = env.run_root()
    cap = floor = 0
    if plan is not None and tier is not None:
        folder = plan.run_dir / (Path(tier.path).expanduser() if tier.path else "kv")
        cap, floor = tier.size, tier.min_free
    here = folder
    while not here.exists():
        here = here.parent
    facts = os.statvfs(here)
    free, held = facts.f_bavail * facts.f_frsize, _held(folder) if cap else 0
    yield judge_space(str(folder), free, held, cap, floor)
    if free < _SPARE or not os.access(here, os.W_OK):
        yield skip(f"{DISK} speed", f"not measured: {here} is full or cannot be written to")
        return
    yield judge_speed(str(here), measure(here), needed=bool(cap))


def _held(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0


def judge_space(folder: str, free: int, held: int, cap: int, floor: int) -> Finding:
    text = f"{folder}: {preflight.gib(free)} free"
    if not cap:
        return ok(DISK, f"{text} (no disk tier in the topology)") if free > _SPARE else _full(text)
    room = free + held - floor
    if room < _SPARE:
        means = "The disk tier has no room to write: it refuses chunks and serves what it has."
        fix = "Free space, point cache.disk.path at another disk, or lower cache.disk.min_free."
        return fail(DISK, f"{text}, {preflight.gib(floor)} must stay free", means, fix)
    if cap > room:
        means = f"The cap of {preflight.gib(cap)} cannot be reached: writing stops when {preflight.gib(floor)} are left free."
        return warn(
            DISK, f"{text}, cap {preflight.gib(cap)}", means, f"Set cache.disk.size to {room >> 30}GiB, or free space."
        )
    return ok(DISK, f"{text}, cap {preflight.gib(cap)}, {preflight.gib(held)} held")


def _full(text: str) -> Finding:
    return warn(
        DISK, text, "Logs and state of deployments are kept there.", "Free space, or set PDSERVE_RUN_DIR elsewhere."
    )


def judge_speed(folder: str, speed: Speed, needed: bool) -> Finding:
    how = "O_DIRECT" if speed.direct else "through the page cache: this file system has no O_DIRECT"
    text = f"{folder}: write {speed.write / 1e6:.0f}, read {speed.read / 1e6:.0f} MB/s ({how})"
    name = f"{DISK} speed"
    if needed and speed.read < SLOW:
        means = "Loading from it is likely to take longer than computing; engines measure that and compute instead."
        return warn(name, text, means, "Put cache.disk.path on a local NVMe disk, or leave the disk tier out.")
    return ok(name, text, write_bytes_per_s=speed.write, read_bytes_per_s=speed.read)


def measure(folder: Path) -> Speed:
    """At most 64 MiB or a second each way. The file has no name: a killed doctor leaves nothing."""
    direct = True
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
    except OSError:
        direct = False
        fd = _nameless(folder)
    try:
        with mmap.mmap(-1, _PIECE) as piece:  # page-aligned, as O_DIRECT wants it
            piece.write(secrets.token_bytes(_PIECE))
            written, writing = _moved(fd, piece, _MOST, os.pwritev)
            read, reading = _moved(fd, piece, written, os.preadv)
    finally:
        os.close(fd)
    return Speed(written / writing, read / reading, direct)


def _nameless(folder: Path) -> int:
    name = folder / f".pdserve-doctor-{secrets.token_hex(8)}"
    fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    name.unlink()
    return fd


def _moved(fd: int, piece: mmap.mmap, most: int, move: object) -> tuple[int, float]:
    done, begun = 0, time.monotonic()
    while done < most and time.monotonic() - begun < _SECONDS:
        moved: int = move(fd, [piece], done)  # type: ignore[operator]
        if moved <= 0:
            break
        done += moved
    return done, max(time.monotonic() - begun, 1e-9)


# --- remote tiers -------------------------------------------------------------------------------------------------


def tiers(subject: Subject) -> Iterator[Finding]:
    top = subject.topology
    for n, url in enumerate(top.cache.tiers if top and top.cache else ()):
        yield probe_tier(url, f"cache.tiers[{n}]")


def probe_tier(url: str, key: str) -> Finding:
    """One chunk of a random key, put, read back, deleted: reaches what a daemon would reach, with its credentials."""
    shown = registry.show(url)
    name = f"{TIER} {url.partition(':')[0]}"
    try:
        tier = registry.bare(url, key)
    except ConfigError as error:
        return fail(
            name, error.problem, "The cache daemon refuses it and does not start.", error.fix or f"Change {key}."
        )
    begun = time.monotonic()
    try:
        problem = _round_trip(tier)
    except (CacheError, OSError) as error:
        problem = registry.show(str(error)) or type(error).__name__
    finally:
        tier.close()
    if problem:
        means = "Requests are served without this tier; nothing is kept in it and nothing found."
        fix = f"Start that server, or correct {key} ({shown}): host, port, user and password, or the bucket's name."
        return fail(name, f"{shown}: {problem}", means, fix)
    return ok(name, f"{shown}: put, got and deleted a chunk in {(time.monotonic() - begun) * 1e3:.0f} ms")


def _round_trip(tier: Tier) -> str:
    """ "" when what was put came back and went away; else what did not."""
    deadline = time.monotonic() + _TIER_SECONDS
    payload = np.frombuffer(secrets.token_bytes(_SHARD), np.uint8).copy()
    key, parent, tag = secrets.token_bytes(KEY_BYTES), secrets.token_bytes(KEY_BYTES), secrets.token_bytes(16)
    record = ChunkRecord(FORMAT_VERSION, key, parent, 16, _SHARD, [kernels.digest(payload)], tag)
    if not tier.put(record, [payload], deadline):
        return "it refused to store (full, or read-only)"
    try:
        back = np.zeros(_SHARD, np.uint8)
        if not tier.get(record, [back], deadline):
            return "what was stored was not found again"
        if not np.array_equal(back, payload):
            return "what came back is not what was stored"
    finally:
        gone = tier.delete([key])
    return "" if gone else "the probe could not be deleted again"

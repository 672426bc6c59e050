"""From simulations to advice: a sweep over memory and instances, the cheapest setup that keeps the target, and what limits it. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pdserve.bench.size.simulate import GIB, Setup, Simulated, simulate
from pdserve.bench.size.speeds import Speeds
from pdserve.bench.size.work import Work

BUSY = 0.7  # of its time that an engine may be planned to compute: above it queues grow without bound in practice


@dataclass(frozen=True, slots=True)
class Point:
    """One simulated setup. `gib`: size of the swept tier."""

    gib: float
    instances: int
    hit_rate: float
    gpu_rate: float
    ttft_p50: float
    ttft: float  # at the asked quantile
    found: Simulated

    def kept(self, target: float) -> bool:
        return bool(self.found.requests) and self.ttft <= target


@dataclass(frozen=True, slots=True)
class Advice:
    points: tuple[Point, ...]
    best: Point | None
    producers: int
    consumers: int
    distinct_gib: float
    sentences: tuple[str, ...]


def sweep(
    work: Work,
    speeds: Speeds,
    setup: Setup,
    sizes_gib: Sequence[float],
    most_instances: int,
    target: float,
    quantile: float,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Point]:
    """For every size the fewest instances that keep the target, up to the most; the first tier is the one that is swept."""
    name, found = setup.tiers[0][0] if setup.tiers else "dram", []
    for gib in sizes_gib:
        tokens = int(gib * GIB / setup.kv_bytes)
        for count in range(1, most_instances + 1):
            tell(f"{gib:g} GiB, {_counted(count)}")
            one = replace(setup, instances=count, tiers=((name, tokens), *setup.tiers[1:]))
            point = _point(gib, count, simulate(work, speeds, one), quantile)
            found.append(point)
            if point.kept(target):
                break
    return found


def _point(gib: float, count: int, found: Simulated, quantile: float) -> Point:
    own = found.hits.get("gpu", 0) / found.prompt if found.prompt else 0.0
    return Point(gib, count, found.hit_rate, own, found.ttft(0.5), found.ttft(quantile), found)


def choose(points: Sequence[Point], target: float) -> Point | None:
    """The fewest instances, then the least memory."""
    kept = [p for p in points if p.kept(target)]
    return min(kept, key=lambda p: (p.instances, p.gib)) if kept else None


def split(found: Simulated, seqs: int) -> tuple[int, int]:
    """(producers, consumers) so that neither kind is planned busier than BUSY."""
    if not found.seconds:
        return 1, 1
    producers = math.ceil(found.busy / found.seconds / BUSY)
    consumers = math.ceil(found.writing / found.seconds / seqs / BUSY)
    return max(1, producers), max(1, consumers)


def advise(
    points: Sequence[Point], work: Work, setup: Setup, target: float, quantile: float, tier: str = "dram"
) -> Advice:
    best = choose(points, target)
    shown = best or min(points, key=lambda p: p.ttft)
    producers, consumers = split(shown.found, setup.seqs)
    distinct = work.distinct_tokens * setup.kv_bytes / GIB
    return Advice(
        tuple(points),
        best,
        producers,
        consumers,
        distinct,
        tuple(_sentences(points, best, shown, target, quantile, distinct, tier)),
    )


def _counted(instances: int) -> str:
    return f"{instances} instance{'s' if instances != 1 else ''}"


def _sentences(
    points: Sequence[Point],
    best: Point | None,
    shown: Point,
    target: float,
    quantile: float,
    distinct: float,
    tier: str,
) -> list[str]:
    said = []
    what = f"TTFT p{quantile * 100:g}"
    if best is None:
        said.append(
            f"No simulated setup keeps {what} <= {target:g} s; the best is {_counted(shown.instances)} with {shown.gib:g} GiB of {tier} "
            f"at {shown.ttft:.2f} s. Faster engines or more instances (--max-instances) are needed."
        )
    else:
        said.append(
            f"Buy: {_counted(best.instances)} and {best.gib:g} GiB of {tier}: {what} {best.ttft:.2f} s, "
            f"{best.hit_rate:.0%} of the prompt tokens hit ({best.gpu_rate:.0%} in the GPUs' own caches)."
        )
        less = [p for p in points if p.gib < best.gib and p.instances <= best.instances]
        if less:
            near = max(less, key=lambda p: (p.gib, p.instances))
            said.append(
                f"With {near.gib:g} GiB and {near.instances} it would be {near.ttft:.2f} s at {near.hit_rate:.0%} hits."
            )
    same = [p for p in points if p.instances == shown.instances]
    top = max((p.hit_rate for p in same), default=0.0)
    enough = min((p.gib for p in same if p.hit_rate >= 0.98 * top), default=shown.gib)
    said.append(
        f"All different KV of this load takes {distinct:.1f} GiB; beyond {enough:g} GiB of {tier} hits hardly grow."
    )
    return said

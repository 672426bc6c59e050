"""Hit rates of the eviction policies on conversations, beside the best that anybody could do who knows the future. No engine.

    python tests/bench/bench_eviction.py ../shared/traces      # a folder of traces (.json or .json.gz), as kv-cache-tester has
    python tests/bench/bench_eviction.py                       # conversations made up here: runs anywhere

A request hits the chunks from its start on that are there, up to the first gap; what is missing is stored after it. The
optimum is Belady's: evict, or do not even store, what is used again last. A chunk is used whenever one that builds on it
is, so the one that is used last is a leaf, and the optimum for prefixes is that for pages.

`work` weighs each chunk with what computing it takes, which grows with what stands before it (eviction.recompute_cost).
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pdserve.transfer.eviction import POLICIES, EvictionPolicy, recompute_cost

CHUNK_TOKENS = 256
SIZES = (0.02, 0.05, 0.1, 0.2, 0.4)
FAR = sys.maxsize


class Load(NamedTuple):
    """Requests in the order of their arrival; chunks are numbers, a parent's is smaller than its child's."""

    requests: list[list[int]]
    parents: list[int]
    depths: list[int]


# ---- where requests come from ----


def read_traces(folder: Path, spacing: float) -> Iterator[tuple[float, str, list[int], int]]:
    """(arrival, conversation, block ids, tokens of a block); one conversation begins every `spacing` seconds."""
    files = sorted(f for f in folder.iterdir() if f.name.endswith((".json", ".json.gz")))
    if not files:
        raise SystemExit(f"no .json or .json.gz in {folder}")
    random.Random(1).shuffle(files)
    for number, file in enumerate(files):
        data = file.read_bytes()
        trace = json.loads(gzip.decompress(data) if file.suffix == ".gz" else data)
        for at, ids in _flat(trace["requests"], number * spacing):
            yield at, file.name, ids, trace["block_size"]


def _flat(requests: list[dict[str, Any]], start: float) -> Iterator[tuple[float, list[int]]]:
    for request in requests:
        if "requests" in request:
            yield from _flat(request["requests"], start + request["t"])
        elif request.get("hash_ids"):
            yield start + request["t"], request["hash_ids"]


def make_up(conversations: int, spacing: float) -> Iterator[tuple[float, str, list[int], int]]:
    """Agents at work: a system prompt that some share, turns that grow, side branches that come to nothing, long pauses."""
    rng = random.Random(7)
    for number in range(conversations):
        fresh = iter(range(1_000_000 * (number + 1), 1_000_000 * (number + 2)))
        context = [rng.randrange(4) * 1000 + i for i in range(rng.choice([10, 40]))]
        context += [next(fresh) for _ in range(rng.randrange(5, 200))]
        at = number * spacing * rng.uniform(0.5, 1.5)
        for _ in range(min(80, int(rng.paretovariate(0.9)) + 1)):
            at += rng.lognormvariate(3, 1.5)
            yield at, "shared", list(context), CHUNK_TOKENS
            if rng.random() < 0.15:
                aside = context[: rng.randrange(len(context))]
                yield at + 1, "shared", aside + [next(fresh) for _ in range(rng.randrange(2, 60))], CHUNK_TOKENS
            context += [next(fresh) for _ in range(rng.randrange(1, 12))]


def load_of(source: Iterator[tuple[float, str, list[int], int]]) -> Load:
    numbers: dict[tuple[int, Any], int] = {}
    parents, depths, requests = [], [], []
    for _, conversation, ids, block in sorted(source, key=lambda r: (r[0], r[1])):
        per_chunk = max(1, CHUNK_TOKENS // block)
        chunks, parent = [], -1
        for start in range(0, len(ids) - per_chunk + 1, per_chunk):
            content = tuple(ids[start : start + per_chunk])
            name = (parent, content if parent >= 0 else (conversation, content))
            number = numbers.get(name)
            if number is None:
                number = numbers[name] = len(parents)
                parents.append(parent)
                depths.append(depths[parent] + 1 if parent >= 0 else 0)
            chunks.append(number)
            parent = number
        if chunks:
            requests.append(chunks)
    return Load(requests, parents, depths)


# ---- policies and the optimum ----


def run_policy(load: Load, capacity: int, make: Callable[[], EvictionPolicy]) -> list[int]:
    """How many chunks each request hit."""
    policy, there = make(), set[int]()
    names = [i.to_bytes(8, "big") for i in range(len(load.parents))]
    hits = []
    for chunks in load.requests:
        hit = next((i for i, c in enumerate(chunks) if c not in there), len(chunks))
        hits.append(hit)
        for c in reversed(chunks[:hit]):  # as Store.lookup does
            policy.touch(names[c])
        for c in chunks[hit:]:
            if len(there) >= capacity:
                victim = policy.victim()
                parent = load.parents[c]
                if victim is None or (parent >= 0 and victim == names[parent]):
                    break
                policy.remove(victim)
                there.discard(int.from_bytes(victim, "big"))
            there.add(c)
            policy.add(names[c], names[load.parents[c]] if load.parents[c] >= 0 else b"")
    return hits


def run_optimum(load: Load, capacity: int) -> list[int]:
    upcoming: dict[int, int] = {}
    later: list[list[int]] = []
    for number in range(len(load.requests) - 1, -1, -1):
        later.append([upcoming.get(c, FAR) for c in load.requests[number]])
        for c in load.requests[number]:
            upcoming[c] = number
    later.reverse()
    there: dict[int, int] = {}  # chunk -> when it is used next
    heap: list[tuple[int, int, int]] = []
    hits = []
    for chunks, nexts in zip(load.requests, later, strict=True):
        hit = next((i for i, c in enumerate(chunks) if c not in there), len(chunks))
        hits.append(hit)
        for c, when in zip(chunks, nexts, strict=True):
            if when == FAR:  # never again: not worth the space
                there.pop(c, None)
                continue
            there[c] = when
            heapq.heappush(heap, (-when, -load.depths[c], c))
        while len(there) > capacity:
            when, _, c = heapq.heappop(heap)
            if there.get(c) == -when:
                del there[c]
    return hits


def measure(load: Load, sizes: tuple[float, ...], names: list[str]) -> list[dict[str, Any]]:
    asked = sum(map(len, load.requests))
    deepest = max(load.depths) + 1
    work = [0.0]
    for depth in range(deepest):
        work.append(work[-1] + recompute_cost(depth))
    all_work = sum(work[len(c)] for c in load.requests)
    rows = []
    runs: dict[str, Callable[[int], list[int]]] = {
        name: lambda capacity, make=POLICIES[name]: run_policy(load, capacity, make) for name in names
    }
    runs["optimum"] = lambda capacity: run_optimum(load, capacity)
    for size in sizes:
        capacity = max(1, int(size * len(load.parents)))
        for name, run in runs.items():
            began = time.perf_counter()
            hits = run(capacity)
            rows.append(
                {
                    "policy": name,
                    "size": size,
                    "chunks": capacity,
                    "hit_rate": sum(hits) / asked,
                    "work_saved": sum(work[h] for h in hits) / all_work,
                    "us_per_chunk": (time.perf_counter() - began) / asked * 1e6,
                }
            )
    return rows


def show(load: Load, rows: list[dict[str, Any]], names: list[str], sizes: tuple[float, ...]) -> None:
    asked, distinct = sum(map(len, load.requests)), len(load.parents)
    print(
        f"{len(load.requests)} requests, {asked} chunks of {CHUNK_TOKENS} tokens asked for, {distinct} different ones"
    )
    print(f"a cache without end would hit {1 - distinct / asked:.1%}\n")
    found = {(r["policy"], r["size"]): r for r in rows}
    for field, title in (("hit_rate", "hit rate"), ("work_saved", "work saved")):
        print(f"{title:14}" + "".join(f"{f'{s:.0%} of all':>20}" for s in sizes))
        for name in [*names, "optimum"]:
            cells = []
            for size in sizes:
                value, best = found[name, size][field], found["optimum", size][field]
                cells.append(f"{value:>8.1%} ({value / best if best else 1:4.0%} opt)".rjust(20))
            print(f"{name:14}" + "".join(cells))
        print()
    for name in names:
        cost = [found[name, size]["us_per_chunk"] for size in sizes]
        print(f"{name:14}{min(cost):.2f} to {max(cost):.2f} us for each chunk asked for, the simulation included")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="?", type=Path, help="folder of traces; none: conversations made up here")
    parser.add_argument("--policies", nargs="+", choices=sorted(POLICIES), default=sorted(POLICIES))
    parser.add_argument("--sizes", nargs="+", type=float, default=list(SIZES), help="parts of all different chunks")
    parser.add_argument("--spacing", type=float, default=120.0, help="seconds between beginnings of conversations")
    parser.add_argument("--conversations", type=int, default=400, help="how many to make up")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    source = read_traces(args.traces, args.spacing) if args.traces else make_up(args.conversations, args.spacing / 10)
    load = load_of(source)
    sizes = tuple(args.sizes)
    rows = measure(load, sizes, args.policies)
    show(load, rows, args.policies, sizes)
    if args.json:
        Path(args.json).write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What a look of the dashboard costs: reading an engine's page, and one look at several engines and the proxy.

.venv/bin/python -P tests/bench/bench_dashboard.py [--engines 8] [--series 800]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pdserve.metrics.metric import build
from pdserve.metrics.proxy import PROXY
from pdserve.proxy.dashboard.board import Memory
from pdserve.proxy.dashboard.collector import Collector
from pdserve.proxy.dashboard.engines import _NAMES
from pdserve.proxy.dashboard.supervised import Supervised
from pdserve.proxy.exposition import joined, read
from pdserve.proxy.fleet import Fleet
from pdserve.proxy.instance import Instance
from pdserve.proxy.lifetime import Deadlines
from pdserve.proxy.upstream import Upstream


def page(series: int) -> bytes:
    """As large as vLLM's, most of it histograms that nobody here reads."""
    lines = [b'vllm:num_requests_running{model_name="m",engine="0"} 3.0', b"process_start_time_seconds 1.0"]
    lines += [b'vllm:some_seconds_bucket{engine="0",le="%d.0",model_name="m"} %d.0' % (n, n) for n in range(series)]
    return b"\n".join(lines) + b"\n"


def median_ms(what: Callable[[], object], times: int = 30) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        what()
        taken.append((time.perf_counter() - began) * 1000)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--series", type=int, default=800)
    args = parser.parse_args()
    text = page(args.series)
    print(f"one engine's page, {len(text) >> 10} KiB:")
    print(f"  ours                        {median_ms(lambda: read(text, _NAMES)):7.2f} ms")
    print(
        f"  prometheus_client.parser    {median_ms(lambda: list(text_string_to_metric_families(text.decode())), 5):7.2f} ms"
    )
    print(
        f"  joined with {args.engines - 1} others         {median_ms(lambda: joined([('e', text)] * args.engines), 10):7.2f} ms"
    )

    registry = CollectorRegistry()
    made = build(PROXY, registry)
    instances = [
        Instance(f"e{n}", "decode", Upstream(f"e{n}", "http://127.0.0.1:1"), up=True) for n in range(args.engines)
    ]
    fleet = Fleet(instances, Deadlines(), made)
    collector = Collector(fleet, [], lambda: generate_latest(registry), Memory(), Supervised(""), {})

    async def looks() -> list[float]:
        taken = []
        for n in range(40):
            for engine in collector._engines.values():
                engine.asked = True
            for instance in instances:
                instance.exposed = text + b"\n" * n  # a new page each time
            began = time.perf_counter()
            await collector.look(1000.0 + 2 * n)
            taken.append((time.perf_counter() - began) * 1000)
        return taken[5:]

    print(f"a whole look at {args.engines} engines:    {statistics.median(asyncio.run(looks())):7.2f} ms")


if __name__ == "__main__":
    main()

"""After everything else: what is held does not grow with requests, good or broken off."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import psutil

if TYPE_CHECKING:
    from .conftest import Deployment

ROUNDS = 12
SLACK = 3  # a pooled connection, an executor's thread: bounded by the pool, not by the number of requests


def held(deployment: Deployment) -> dict[str, tuple[int, int]]:
    """File descriptors and threads of every process of the deployment, children included."""
    counts = {}
    for name, record in deployment.processes().items():
        if record["role"] == "plain" or not record["pid"]:
            continue
        process = psutil.Process(record["pid"])
        for n, p in enumerate([process, *process.children(recursive=True)]):
            counts[f"{name}.{n}"] = (p.num_fds(), p.num_threads())
    return counts


def burst(deployment: Deployment) -> None:
    """Requests that end, that are refused, and that are left, several at once."""

    def one(n: int) -> None:
        if n % 3 == 0:
            deployment.client.complete(deployment.ids(140 + n), max_tokens=3)
        elif n % 3 == 1:
            deployment.client.request("POST", "/v1/completions", json={"model": "no-such-model", "prompt": "a"})
        else:
            body = {"model": deployment.client.model, "prompt": list(deployment.ids(280)), "max_tokens": 300}
            with (
                httpx.Client(base_url=deployment.client.url, timeout=60, trust_env=False) as http,
                http.stream("POST", "/v1/completions", json={**body, "stream": True, "ignore_eos": True}) as answer,
            ):
                next(answer.iter_lines())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(ROUNDS)))
    deployment.wait_idle()


def check(deployment: Deployment) -> None:
    burst(deployment)
    before, clients = held(deployment), len(deployment.status()["clients"])
    burst(deployment)
    burst(deployment)
    after = held(deployment)
    assert before.keys() == after.keys(), "a process came or went"
    grown = {
        n: (before[n], after[n]) for n in after if any(b > a + SLACK for a, b in zip(before[n], after[n], strict=True))
    }
    assert not grown, f"(descriptors, threads) before and after: {grown}"
    status = deployment.status()
    assert status["leases"] == 0
    assert status["reservations"] == 0
    assert len(status["clients"]) == clients


def test_no_leak_in_pd(pd: Deployment) -> None:
    check(pd)


def test_no_leak_in_both(both: Deployment) -> None:
    check(both)

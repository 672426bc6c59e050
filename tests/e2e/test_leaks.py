"""After everything else: what is held does not grow with requests, good or broken off."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import psutil

from .conftest import wait_for

if TYPE_CHECKING:
    from .conftest import Deployment

SLACK = 4  # kept connections and executor threads: bounded by how many requests there are at once, not by their number


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


def connected(deployment: Deployment) -> int:
    """Engines that move chunks; what they tell of requests goes over connections that come and go."""
    return sum("/facts" not in label for label in deployment.status()["clients"])


def burst(deployment: Deployment, at_once: int) -> None:
    """Twelve requests, in turn one that ends, one that is refused, one that is left, several at once."""

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

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, range(12)))
    deployment.wait_idle()


def check(deployment: Deployment) -> None:
    burst(deployment, 12)
    burst(deployment, 12)
    before, clients = held(deployment), connected(deployment)
    for _ in range(3):
        burst(deployment, 4)
    grown = _grown(before, deployment)
    deadline = time.monotonic() + 60  # what is let go may be closed a moment later
    while grown and time.monotonic() < deadline:
        time.sleep(1)
        grown = _grown(before, deployment)
    assert not grown, f"(descriptors, threads) before and after: {grown}"
    status = deployment.status()
    assert status["leases"] == 0
    assert status["reservations"] == 0
    wait_for(lambda: connected(deployment) == clients, 60, "engines' connections came or went")


def _grown(before: dict[str, tuple[int, int]], deployment: Deployment) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    after = held(deployment)
    assert before.keys() == after.keys(), "a process came or went"
    return {
        n: (before[n], after[n]) for n in after if any(b > a + SLACK for a, b in zip(before[n], after[n], strict=True))
    }


def test_no_leak_in_pd(pd: Deployment) -> None:
    check(pd)


def test_no_leak_in_both(both: Deployment) -> None:
    check(both)

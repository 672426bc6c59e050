from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from ports import free_port

from pdserve.engines.fake.server import FakeEngine
from pdserve.proxy.shared import Together
from pdserve.proxy.workers import Parent

pytestmark = pytest.mark.anyio

START = (
    "import argparse, sys; from pdserve.proxy import app; p = argparse.ArgumentParser(); app.add_arguments(p); "
    "sys.exit(app.main(p.parse_args()))"
)


def test_counts_of_workers(tmp_path: Path) -> None:
    one, two, three = (Together(tmp_path, row) for row in (1, 2, 63))
    one.add("decode-0", 3)
    two.add("decode-0", 2)
    two.add("decode-0", -1)
    assert [w.others("decode-0") for w in (one, two, three)] == [1, 3, 4]
    assert three.others("decode-1") == 0
    again = Together(tmp_path, 1)  # a worker that takes the place of one that was killed
    assert two.others("decode-0") == 0
    for worker in (one, two, three, again):
        worker.close()


def test_what_a_worker_counted_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed with requests under way: they are no load any more, and take no place of a key's."""
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", "import time; time.sleep(600)"])
    parent = Parent(2, lambda: socket.create_server(("127.0.0.1", 0)), 5, 5)
    try:
        first, second = parent._workers = [parent._start(slot) for slot in range(2)]
        rows = [parent._rows[worker.pid] for worker in (first, second)]
        killed, other = (Together(parent._folder, row) for row in rows)
        killed.add("key alice", 3)
        assert other.others("key alice") == 3
        first.kill()
        first.wait(30)
        parent._look_after()
        assert other.others("key alice") == 0
        for _ in range(3):  # rows that are in use are not given to others
            third = parent._start(0)
            assert parent._rows[third.pid] != rows[1]
            third.kill()
            third.wait(30)
            parent._gone(third)
        other.close()
        killed.close()
    finally:
        parent._stop_all()
        shutil.rmtree(parent._folder)
        for bound in parent._sockets:
            bound.close()


def test_what_one_is_told_of_instances_the_others_hear_once(tmp_path: Path) -> None:
    one, two = Together(tmp_path, 1), Together(tmp_path, 2)
    now = {"a": ("decode", "http://h:1")}
    assert two.listed() is None
    one.change("b", ("decode", "http://h:2"), now)
    assert one.listed() is None
    assert two.listed() == {**now, "b": ("decode", "http://h:2")}
    assert two.listed() is None
    two.change("a", None, now)
    assert one.listed() == {"b": ("decode", "http://h:2")}
    one.close()
    two.close()


@contextlib.asynccontextmanager
async def running(engine: FakeEngine, *words: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    port = free_port()
    argv = ["--port", str(port), "--both", f"both-0={engine.url}", "--workers", "2", "--shutdown-timeout", "5", *words]
    environment = {**os.environ, "PDSERVE_ADMIN_TOKEN": "boss"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", START, *argv, stderr=asyncio.subprocess.PIPE, env=environment
    )
    said = b""
    assert process.stderr is not None
    try:
        async with asyncio.timeout(120):
            while b"2 workers on port" not in said:
                line = await process.stderr.readline()
                assert line, said.decode()
                said += line
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(60):
            _, rest = await process.communicate()
        assert b"Traceback" not in said + rest, (said + rest).decode()
        assert process.returncode == 0


async def test_two_workers_a_restart_without_loss_and_one_list_of_instances(until: Callable[..., Any]) -> None:
    key, short = {"authorization": "Bearer boss"}, {"model": "fake", "prompt": "c", "max_tokens": 1}
    async with (
        FakeEngine(name="both-0", gap=0.02) as engine,
        FakeEngine(name="both-9") as late,
        running(engine) as (process, url),
        httpx.AsyncClient(timeout=30, verify=False, limits=httpx.Limits(max_keepalive_connections=0)) as client,
    ):

        async def ask(body: dict[str, Any]) -> httpx.Response:
            return await client.post(url + "/v1/completions", json=body)

        body = {"model": "fake", "prompt": "a b", "stream": True, "max_tokens": 60}
        streams = [asyncio.create_task(ask(body)) for _ in range(8)]
        await until(lambda: len(engine.seen) == 8, 20)
        process.send_signal(signal.SIGHUP)
        for _ in range(30):  # goes on while workers come and go
            assert (await ask(short)).status_code == 200
            await asyncio.sleep(0.05)
        for reply in await asyncio.gather(*streams):
            assert reply.status_code == 200
            assert reply.text.count("data: ") == 61
            assert reply.text.endswith("data: [DONE]\n\n")
        ended = 'pdserve_requests_total{endpoint="/v1/completions",route="local",status="200"} 38.0'
        none_runs = 'pdserve_requests_running{endpoint="/v1/completions"} 0.0'
        async with asyncio.timeout(30):  # a worker counts a request after the client has had its last byte
            while not (ended in (shown := (await client.get(url + "/metrics")).text) and none_runs in shown):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

        wanted = {"name": "both-9", "role": "both", "url": late.url}
        assert (await client.post(url + "/admin/instances", json=wanted, headers=key)).status_code == 201
        async with asyncio.timeout(60):
            while True:  # new connections reach both workers, by chance
                told = [await client.get(url + "/admin/instances", headers=key) for _ in range(16)]
                states = [{i["name"]: i["state"] for i in reply.json()["instances"]} for reply in told]
                if all(found == {"both-0": "up", "both-9": "up"} for found in states):
                    break
        assert {(await ask(short)).headers["x-pdserve-decode"] for _ in range(16)} == {"both-0", "both-9"}


async def test_whichever_worker_is_asked_shows_the_records_of_all() -> None:
    key = {"authorization": "Bearer boss"}
    async with (
        FakeEngine(name="both-0") as engine,
        running(engine) as (_, url),
        httpx.AsyncClient(timeout=30, verify=False, limits=httpx.Limits(max_keepalive_connections=0)) as client,
    ):
        for n in range(24):  # each on a connection of its own, which the kernel gives to either worker
            body = {"model": "fake", "prompt": "a", "max_tokens": 1}
            reply = await client.post(url + "/v1/completions", json=body, headers={"x-request-id": f"r{n}"})
            assert reply.status_code == 200
        all_ = [f"r{n}" for n in reversed(range(24))]
        for _ in range(8):
            async with asyncio.timeout(60):  # one that does not tell within a second is left out
                while True:
                    told = (await client.get(url + "/admin/requests", headers=key)).json()["requests"]
                    one = (await client.get(url + "/admin/requests/r7", headers=key)).json()
                    if [r["id"] for r in told] == all_ and one.get("spans"):
                        break

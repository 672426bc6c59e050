"""A whole deployment without a model, in processes of its own: fake engines, a real cache daemon with a disk, a real
proxy. Fake engines have no KV, so `Shadow` stores, loads and tells in their place, through the engines' own client.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families

from pdserve import kernels
from pdserve.chunk import KEY_BYTES
from pdserve.errors import CacheUnavailable
from pdserve.transfer import telling, wire
from pdserve.transfer.client import CacheClient

CHUNK = 256
SHARD = 64 * 1024
START_S = 120.0


def until(condition: Callable[[], Any], what: str, seconds: float = START_S) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)
    return found


def get(url: str, key: str = "") -> Any:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as reply:
        text = reply.read().decode()
    return json.loads(text) if "json" in reply.headers["content-type"] else text


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


class Stand:
    """Use it with `with`. `engines` are names like prefill-0 and decode-1."""

    def __init__(
        self,
        folder: Path,
        engines: tuple[str, ...] = ("prefill-0", "decode-0"),
        *words: str,
        key: str = "",
        gap: float = 0.01,
    ) -> None:
        self.folder, self.key, self._words, self._gap = folder, key, words, gap
        self.engines = {name: free_port() for name in engines}
        self.proxy_port, self.cache_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.proxy_port}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._arena = f"dash-{os.getpid()}-{self.proxy_port}"
        self.socket = folder / "c.sock"

    def __enter__(self) -> Stand:
        try:
            self.start_cache()
            for name in self.engines:
                self.start_engine(name)
            self.start_proxy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for file in Path("/dev/shm").glob(f"pdserve-{self._arena}*"):
            file.unlink(missing_ok=True)

    def _run(self, name: str, *argv: str) -> None:
        environment = {**os.environ, "PDSERVE_ADMIN_TOKEN": self.key}
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-P", "-m", *argv]
            self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, env=environment)

    def start_engine(self, name: str) -> None:
        port = self.engines[name]
        self._run(name, "pdserve.engines.fake.server", "--port", str(port), "--gap", str(self._gap), "--delay", "0.03")
        until(lambda: answers(f"http://127.0.0.1:{port}/health"), name)

    def start_cache(self) -> None:
        size, disk = str(48 << 20), str(self.folder / "kv")
        words = [
            "--socket",
            str(self.socket),
            "--size",
            size,
            "--name",
            self._arena,
            "--admin-port",
            str(self.cache_port),
        ]
        words += ["--disk", disk, "--disk-size", str(96 << 20), "--disk-min-free", "1MiB"]
        self._run("cache", "pdserve", "cache", "serve", *words)
        until(lambda: answers(f"http://127.0.0.1:{self.cache_port}/healthz"), "the cache")

    def start_proxy(self) -> None:
        words = [
            "--port",
            str(self.proxy_port),
            "--cache",
            f"cache=http://127.0.0.1:{self.cache_port}",
            "--model",
            "fake",
        ]
        for name, port in self.engines.items():
            words += [f"--{name.partition('-')[0]}", f"{name}=http://127.0.0.1:{port}"]
        self._run("proxy", "pdserve", "proxy", *words, *self._words)
        until(lambda: answers(f"{self.url}/health"), "the proxy")

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        self.processes[name].send_signal(number)
        self.processes[name].wait(30)

    def ask(self, tokens: int = 20, **more: Any) -> tuple[int, dict[str, str]]:
        """A streamed completion, read to its end: status and headers."""
        headers = more.pop("headers", {})
        body = {"model": "fake", "prompt": "word " * tokens, "stream": True, "max_tokens": 8, **more}
        sent = {"content-type": "application/json", **headers}
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), sent)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                reply.read()
                return reply.status, {name.lower(): value for name, value in reply.headers.items()}
        except urllib.error.HTTPError as error:
            error.read()
            return error.code, {name.lower(): value for name, value in error.headers.items()}

    def get(self, path: str) -> Any:
        return get(self.url + path, self.key)

    def cache_metric(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(get(f"http://127.0.0.1:{self.cache_port}/metrics", self.key))
        samples = (sample for family in families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def overview(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/admin/overview")
        return found


class Shadow:
    """What the connectors of two engines would do: the producer stores a prompt's chunks, the consumer loads them."""

    def __init__(self, stand: Stand, producer: str = "prefill-0", consumer: str = "decode-0") -> None:
        self._names, self._socket = (producer, consumer), stand.socket
        self._clients = {name: CacheClient(stand.socket, f"{name}/shadow") for name in dict.fromkeys((*self._names, *stand.engines))}
        self._random = random.Random(7)
        self.keys: list[bytes] = []

    def __enter__(self) -> Shadow:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients.values():
            client.close()

    def store(self, chunks: int, size: int = SHARD, by: str = "") -> list[bytes]:
        """A chain of new chunks, by the producer or another engine."""
        keys = [self._random.randbytes(KEY_BYTES) for _ in range(chunks)]
        items = [
            wire.ReserveItem(
                key=key, parent=keys[i - 1] if i else b"", shard=0, shards=1, shard_bytes=size, tokens=CHUNK
            )
            for i, key in enumerate(keys)
        ]
        client = self._clients[by or self._names[0]]
        grants = client.reserve(self._names[0], items, 30.0)
        kept = [grant for grant in grants if grant.status == wire.GRANTED]
        client.commit(
            [wire.CommitItem(grant.reservation, self._fill(client, grant.offset, size)) for grant in kept], 30.0
        )
        self.keys = keys
        return keys

    def _fill(self, client: CacheClient, offset: int, size: int) -> int:
        """Writes something there; its digest."""
        assert client.arena is not None
        room = client.arena.bytes[offset : offset + size]
        room[:] = np.frombuffer(self._random.randbytes(size), np.uint8)
        return kernels.digest(room)

    def load(self, keys: list[bytes], by: str = "") -> int:
        client = self._clients[by or self._names[1]]
        found = client.lookup(keys, 30.0)
        count = len(found.found)
        if found.lease:
            client.release(found.lease, 30.0, loaded_chunks=count)
        return count

    def tell(
        self,
        request: str,
        keys: list[bytes],
        hit: int,
        tier: str = "dram",
        by: tuple[str, str] | None = None,
        at: float = 0.0,
    ) -> None:
        """As the connectors tell of a request: the producer had `hit` chunks of its prompt and computed the rest."""
        now, tokens, names = at or time.time(), len(keys) * CHUNK, by or self._names
        producer = telling.Leg(
            leg=f"cmpl-{request}-0-0a1b2c3d", traceparent="", at=now, tokens=tokens, chunk_tokens=CHUNK,
            base=b"m", lora="", tag=b"", keys=keys, local=0, covered=hit * CHUNK, first_chunk=0, tiers=[tier] * hit, found=hit,
            why="", saved_ms=hit * 9.5,
        )  # fmt: skip
        load = telling.Span(producer.leg, "load", now, 3.25, hit * SHARD, hit * CHUNK, tier, "")
        store = telling.Span(producer.leg, "store", now + 0.02, 4.5, (len(keys) - hit) * SHARD, tokens - hit * CHUNK)
        ended = telling.Ended(producer.leg, 1, "length", tokens)
        self._say(names[0], [producer, load, store, ended])
        decode = telling.Leg(
            *(
                getattr(producer, name) if name != "leg" else f"cmpl-{request}-0-9f8e7d6c"
                for name in producer.__struct_fields__
            )
        )
        self._say(names[1], [decode, telling.Ended(decode.leg, 8, "length", tokens + 8)])

    def _say(self, name: str, items: list[Any]) -> None:
        """As engines do it: a greeting on a line of its own, then what is to be told, which nobody answers."""
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(30)
            line.connect(str(self._socket))
            line.sendall(wire.encode(wire.Hello(wire.VERSION, f"{name}/shadow", os.getpid())))
            line.recv(65536)
            line.sendall(wire.encode(wire.Facts(items)))
            line.shutdown(socket.SHUT_WR)
            line.recv(1)  # until the daemon has read it all


@contextlib.contextmanager
def traffic(
    stand: Stand, shadow: Shadow, every: float = 0.15, told: bool = True, at_once: int = 1
) -> Iterator[threading.Event]:
    """Requests and what their engines would store and load, until the block is left."""
    over = threading.Event()

    def one(number: int) -> None:
        rng = random.Random(number)
        name = f"req-{number:05d}"
        began = time.time() + 0.004
        _, answered = stand.ask(
            rng.randint(20, 400),
            max_tokens=rng.randint(6, 60),
            headers={"x-request-id": name, "x-session-id": f"chat-{number % 5}"},
        )
        try:
            old = shadow.keys[: rng.randint(0, len(shadow.keys))]
            shadow.load(old, answered.get("x-pdserve-decode", ""))
            new = shadow.store(rng.randint(4, 24), by=answered.get("x-pdserve-prefill", ""))
            if told:
                by = (answered.get("x-pdserve-prefill", ""), answered.get("x-pdserve-decode", ""))
                shadow.tell(
                    name,
                    [*old, *new][:40],
                    len(old),
                    rng.choice(("dram", "dram", "disk")),
                    by if all(by) else None,
                    began,
                )
        except (CacheUnavailable, OSError):
            return  # it may have been stopped on purpose

    def run(first: int) -> None:
        number = first
        while not over.wait(every):
            number += at_once
            one(number)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(at_once)]
    for thread in threads:
        thread.start()
    try:
        yield over
    finally:
        over.set()
        for thread in threads:
            thread.join(60)

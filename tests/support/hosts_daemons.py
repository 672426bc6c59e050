"""Cache daemons on hosts made of namespaces, with chunks that nobody computed: what the tests of transfers and faults share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import netns
import numpy as np

from pdserve import kernels
from pdserve.transfer import wire
from pdserve.transfer.client import CacheClient

PEER_PORT, ADMIN_PORT = 22501, 22502
SECRET = "a secret that only tests know"
MIB = 1 << 20
CHUNK = MIB
PATIENCE_S = 90.0


def key(i: int) -> bytes:
    return int(i).to_bytes(8, "little") + bytes(24)


def content(i: int, size: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, size, dtype=np.uint8)


def until(condition: Callable[[], Any], what: str, patience: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {patience:g} s: {what}"
        time.sleep(0.02)
    return found


class Daemon:
    """`pdserve cache serve` on one host. `peers` are [NAME=]URL; by default every host of the net."""

    def __init__(
        self,
        net: netns.Net,
        name: str,
        folder: Path,
        peers: Iterable[str] = (),
        size: str = "256MiB",
        options: Iterable[str] = (),
    ) -> None:
        self.net, self.name, self.host = net, name, net[name]
        self.socket = folder / f"{name}.sock"
        self.log = folder / f"{name}.log"
        self.label = f"t{os.getpid()}-{name}-{folder.name}"[:60]
        words = [sys.executable, "-P", "-m", "pdserve", "cache", "serve", "--socket", str(self.socket), "--size", size]
        words += ["--name", self.label, "--admin-port", str(ADMIN_PORT), "--host-name", name, "--scrub-rate", "0"]
        words += ["--peer-listen", f"tcp://{self.host.address}:{PEER_PORT}"]
        for peer in list(peers) or [f"{h.name}=tcp://{h.address}:{PEER_PORT}" for h in net.hosts.values()]:
            words += ["--peer", peer]
        self.words = [*words, *options]
        self.process: subprocess.Popen[bytes] | None = None
        self.client = CacheClient(self.socket, f"test-{name}")
        self.began()

    def began(self) -> None:
        self.process = self.host.start(self.words, self.log, PDSERVE_PEER_SECRET=SECRET, PYTHONSAFEPATH="1")

    def again(self) -> None:
        """Another start of it, after its end."""
        self.client.close()
        self.client = CacheClient(self.socket, f"test-{self.name}")
        self.began()
        self.ready()

    def ready(self) -> None:
        def there() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            return bool(self.socket.exists() and self.status())

        until(there, f"daemon {self.name} is ready", 120)
        self.client.connect(30.0)

    def ask(self, path: str, method: str = "GET") -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{ADMIN_PORT}{path}", method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with self.host.inside(), opener.open(request, timeout=30) as answer:
            return json.load(answer)

    def status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self.ask("/status")
        except OSError:
            return {}
        return found

    def peer(self, name: str) -> dict[str, Any]:
        return next((p for p in self.status()["peers"]["peers"] if p["name"] == name), {"state": "", "chunks": -1})

    def sees(self, *names: str) -> None:
        for name in names:
            until(lambda name=name: self.peer(name)["state"] == "up", f"{self.name} sees {name}")

    def knows(self, name: str, chunks: int) -> None:
        until(lambda: self.peer(name)["chunks"] == chunks, f"{self.name} knows the {chunks} chunks of {name}")

    # ---- as an engine would ----

    def put(self, numbers: Iterable[int], size: int = CHUNK) -> None:
        for i in numbers:
            item = wire.ReserveItem(key(i), b"", 0, 1, size, 256)
            (grant,) = self.client.reserve("engine", [item], 30.0)
            assert grant.status == wire.GRANTED, grant
            assert self.client.arena is not None
            self.client.arena.bytes[grant.offset : grant.offset + size] = content(i, size)
            digest = kernels.digest(self.client.arena.bytes[grant.offset : grant.offset + size])
            assert self.client.commit([wire.CommitItem(grant.reservation, digest)], 30.0) == 1

    def find(self, numbers: Iterable[int]) -> tuple[int, int]:
        """(found and right, on their way): one lookup, its lease given back."""
        keys = [key(i) for i in numbers]
        reply = self.client.lookup(keys, 30.0, 1.0)  # an engine that is slow at computing
        assert self.client.arena is not None
        for k, found in zip(keys, reply.found, strict=False):
            there = self.client.arena.bytes[found.offset : found.offset + found.shard_bytes]
            assert (there == content(int.from_bytes(k[:8], "little"), found.shard_bytes)).all(), (
                "wrong bytes were found"
            )
        if reply.lease:
            self.client.release(reply.lease, 30.0)
        return len(reply.found), reply.loading

    def fetch(self, numbers: Iterable[int], patience: float = PATIENCE_S) -> int:
        """Looks up as an engine does until nothing more is on its way; how many it has then. Fails when that has no end."""
        numbers, deadline = list(numbers), time.monotonic() + patience
        while True:
            found, loading = self.find(numbers)
            if not loading:
                return found
            assert time.monotonic() < deadline, f"{found} found, {loading} promised for ever"
            time.sleep(0.02)

    def gets(self, numbers: Iterable[int]) -> None:
        """All of them come from other hosts, be it not at the first attempt: on a busy machine a fetch may be given up."""
        numbers = list(numbers)
        until(lambda: self.fetch(numbers) == len(numbers), f"{self.name} has all {len(numbers)} chunks")

    def promised(self, numbers: Iterable[int]) -> None:
        numbers = list(numbers)
        until(lambda: self.find(numbers)[1] > 0, f"something is on its way to {self.name}")

    def has_all(self, numbers: Iterable[int]) -> bool:
        numbers = list(numbers)
        return self.find(numbers)[0] == len(numbers)

    def released(self, fds: int | None = None) -> None:
        """Nothing is held, reserved or on its way; no more open files than `fds`."""

        def at_rest() -> bool:
            s = self.status()
            p = s["peers"]
            moving = p["incoming"] + p["pulling"] + sum(x["outgoing"] for x in p["peers"])
            return not (s["leases"] or s["reservations"] or moving)

        until(at_rest, f"{self.name} holds nothing: {self.status()}")
        if fds is not None:
            until(lambda: self.fds() <= fds, f"{self.name} has {self.fds()} open files, {fds} before")

    def fds(self) -> int:
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def stop(self) -> None:
        self.client.close()
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)
                raise AssertionError(f"{self.name} did not end: {self.log.read_text()[-2000:]}") from None
        for path in Path("/dev/shm").glob(f"pdserve-{self.label}.*"):
            path.unlink()

    def __repr__(self) -> str:
        return f"daemon {self.name}"

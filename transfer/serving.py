"""`pdserve cache serve`: what its arguments mean, one daemon to a socket, listening, signals, and the end of it all."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from pdserve import env, log, secret
from pdserve.errors import ConfigError, StartError
from pdserve.trace import start as start_tracing
from pdserve.transfer import admin, scrub, slices
from pdserve.transfer.collector import Collector
from pdserve.transfer.daemon import Daemon
from pdserve.transfer.lower import Rules
from pdserve.transfer.scrub import Scrubber
from pdserve.transfer.tiers.absent import Absent
from pdserve.transfer.tiers.base import Tier, TierError

EXPIRE_EVERY_S = COLLECT_EVERY_S = 1.0
#: for so long a tier's thread may run Python while the loop waits to answer; Python's own 5 ms are what a lookup takes ten times
SWITCH_S = 0.0005
#: what a remote tier has not sent by then is a miss
REMOTE_GET_S = 5.0


class _AdminServer(uvicorn.Server):
    """uvicorn without its signal handlers: the daemon has its own."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


async def serve(
    daemon: Daemon, path: Path, admin_host: str, admin_port: int, stop: asyncio.Event, token: str = ""
) -> None:
    """Listens until `stop` is set, then closes everything."""
    loop = daemon.loop = asyncio.get_running_loop()
    daemon.recover()
    path.unlink(missing_ok=True)  # noqa: ASYNC240 - before anything is served
    previous = os.umask(0o177)  # the socket is the user's alone
    try:
        server = await loop.create_unix_server(daemon.protocol, str(path))
    finally:
        os.umask(previous)
    # Bound here, not by uvicorn, which would end the whole process when the port is taken.
    listener = socket.create_server((admin_host, admin_port), backlog=64)
    app = admin.make_app(daemon, token)
    http = _AdminServer(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))
    http_task = asyncio.create_task(http.serve(sockets=[listener]))
    expirer = asyncio.create_task(_expire(daemon))
    daemon.scrubber = Scrubber(daemon.store, daemon.tiering, daemon.metrics, daemon.scrub_rate)
    scrubbing = asyncio.create_task(daemon.scrubber.run())
    host, port = listener.getsockname()[:2]
    daemon.log.info(
        "ready: %s, %.2f GiB, %.2f of them in huge pages, chunks of %d tokens, admin http://%s:%d",
        path,
        daemon.arena.size / 2**30,
        daemon.huge_bytes / 2**30,
        daemon.chunk_tokens,
        host,
        port,
    )
    try:
        if daemon.node is not None:
            await daemon.node.start()
        await stop.wait()
    finally:
        expirer.cancel()
        if daemon.node is not None:  # before the arena goes: returns when nothing moves in or out of it any more
            await daemon.node.stop()
        scrubbing.cancel()
        server.close()
        for connection in list(daemon.clients.values()):
            connection.abort()
        daemon.requests.listeners.close()
        daemon.held.close()
        http.should_exit = True
        await asyncio.wait([http_task, expirer, scrubbing], timeout=5)
        listener.close()
        path.unlink(missing_ok=True)  # noqa: ASYNC240 - nothing is served any more


async def _expire(daemon: Daemon) -> None:
    while True:
        await asyncio.sleep(EXPIRE_EVERY_S)
        daemon.store.expire(time.monotonic())
        daemon.tiering.tick(time.monotonic())
        daemon.pins.expire(time.monotonic())
        if daemon.node is not None:
            daemon.node.tick(time.monotonic())
        daemon.journal.flush()


@contextlib.contextmanager
def _only_one(path: Path) -> Any:
    """Holds a lock beside the socket, so that a second daemon cannot take the first one's arena away."""
    lock = path.with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise StartError(f"another cache daemon already serves {path}") from e
        yield
        lock.unlink(missing_ok=True)


def main(args: argparse.Namespace) -> int:
    """`pdserve cache serve`: args has socket, size (bytes), chunk_tokens, admin_host, admin_port, name; and disk (a folder),
    disk_size (bytes), disk_min_free, disk_write where there is a disk tier."""
    log.setup("cache", args.name, getattr(args, "log_format", None))
    sys.setswitchinterval(SWITCH_S)
    slices.shorten()  # before there are other threads: one that holds Python's lock must not be kept waiting either
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the loop listens: an arena takes a while to make
    path = Path(args.socket)
    if len(str(path)) > 100:
        raise ConfigError(
            "cache.socket",
            f"{path} is longer than a unix socket's path may be",
            "Set PDSERVE_RUN_DIR to a shorter folder.",
        )
    if args.admin_host not in ("127.0.0.1", "localhost", "::1") and not env.admin_token():
        fix = "Set PDSERVE_ADMIN_TOKEN, or bind 127.0.0.1."
        raise ConfigError("cache.admin_host", f"{args.admin_host} is open to others, and there is no token", fix)
    from pdserve.transfer.peers.attach import attach

    with _only_one(path):
        daemon = Daemon(
            name=args.name,
            size=args.size,
            chunk_tokens=args.chunk_tokens,
            policy=getattr(args, "policy", "lru"),
            scrub_rate=getattr(args, "scrub_rate", scrub.DEFAULT_RATE),
            tiers=_tiers(args),
        )
        try:
            if to := start_tracing("cache", getattr(args, "otlp_endpoint", None), getattr(args, "trace_sample", 1.0)):
                daemon.trace(to)
            attach(daemon, args)
            uvloop.run(_run(daemon, path, args))
        finally:
            daemon.close()
    return 0


def _tiers(args: argparse.Namespace) -> list[tuple[Tier, Rules]]:
    """The lower tiers that the arguments ask for. A disk that cannot be opened is shown, not used: the cache works without."""
    tiers: list[tuple[Tier, Rules]] = []
    if getattr(args, "disk", None):
        from pdserve.transfer.tiers.disk import DEFAULT_MIN_FREE, DiskTier

        try:
            disk = DiskTier(Path(args.disk), args.disk_size, min_free=getattr(args, "disk_min_free", DEFAULT_MIN_FREE))
            tiers.append((disk, Rules(write=getattr(args, "disk_write", "write-through"))))
        except TierError as e:
            log.get("cache").error("%s; serving without it", e)
            why = f"not in use since the start of the daemon: {e}"
            tiers.append((Absent("disk", why, args.disk_size), Rules(max_queued=0)))
    for i, url in enumerate(getattr(args, "tier", None) or ()):
        from pdserve.transfer.tiers import registry

        key = f"cache.tiers[{i}]"
        if secret.written_out(url):
            words = "the password in %s can be read in the list of processes; write ${NAME} in its place, or ?password_file=PATH"
            log.get("cache").warning(words, secret.hidden(url))
        tier = registry.build(url, key, REMOTE_GET_S)
        tiers.append((tier, Rules(get_s=REMOTE_GET_S, url=secret.hidden(url))))
    return tiers


async def _run(daemon: Daemon, path: Path, args: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    collecting = asyncio.create_task(_collect(daemon))
    try:
        await serve(daemon, path, args.admin_host, args.admin_port, stop, env.admin_token())
    except OSError as e:
        raise StartError(f"cannot listen on {args.admin_host}:{args.admin_port} or {path}: {e}") from e
    finally:
        collecting.cancel()


async def _collect(daemon: Daemon) -> None:
    collector = Collector(time.monotonic())
    while True:
        await asyncio.sleep(COLLECT_EVERY_S)
        collector.tick(time.monotonic(), daemon.answered)

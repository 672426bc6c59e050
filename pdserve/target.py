"""The deployment that verify, demo and bench talk to: found running, or started for the occasion and stopped again.

It is driven from outside, over HTTP and by the `pdserve` command, exactly as a user's would be.
"""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from pdserve import env, topology
from pdserve.errors import ConfigError, NotRunning, PdserveError, StartError
from pdserve.openai_client import Client, by_label, total
from pdserve.topology import Topology

START_TIMEOUT = 1200.0
STOP_TIMEOUT = 120.0
SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class CacheCounters:
    """The cache daemon's counters that a check is interested in."""

    stored_chunks: float = 0
    loaded_chunks: float = 0
    loaded_bytes: float = 0
    digest_failures: float = 0

    def __sub__(self, other: CacheCounters) -> CacheCounters:
        return CacheCounters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


@dataclass(slots=True)
class Target:
    """URLs of one deployment. What is not known is empty, and the checks that need it are left out."""

    url: str
    plain_url: str
    engines: dict[str, tuple[str, ...]] = field(default_factory=dict)  # role -> URLs
    admin_url: str | None = None
    has_cache: bool = True
    chunk_tokens: int = 256
    dtype: str | None = None
    payload: str = ""  # the topology's cache.payload
    name: str = ""

    @classmethod
    def of(cls, top: Topology, plain_url: str | None = None) -> Target:
        if top.proxy is None:
            raise ConfigError("proxy", f"{top.name} has no proxy to send requests to", "Add a proxy section.")
        plain = plain_url or next((i.url for i in top.of("plain")), "")
        cache = top.cache
        dtypes = {i.engine.dtype for i in top.instances}
        return cls(
            url=top.proxy.url,
            plain_url=plain,
            engines={role: tuple(i.url for i in top.of(role)) for role in ("prefill", "decode", "both")},
            admin_url=f"http://{cache.admin_host}:{cache.admin_port}" if cache else None,
            has_cache=cache is not None,
            chunk_tokens=cache.chunk_tokens if cache else 256,
            dtype=None if dtypes == {"auto"} else ", ".join(sorted(dtypes - {"auto"})),
            payload=cache.payload if cache else "",
            name=top.name,
        )

    @property
    def is_pd(self) -> bool:
        return bool(self.engines.get("prefill") and self.engines.get("decode")) and self.has_cache

    def ask_dtype(self) -> str | None:
        """The plain engine's dtype where it tells (its /server_info needs VLLM_SERVER_DEV_MODE), else None."""
        with Client(self.plain_url) as plain:
            answer = plain.get("/server_info?config_format=json", timeout=10)
        if answer.status_code != 200:
            return None
        dtype: str = answer.json()["vllm_config"]["model_config"]["dtype"]
        return dtype.removeprefix("torch.")

    def empty_engine_caches(self) -> bool:
        """Empties every engine's own prefix cache, so that only pdserve's can hit. False if one does not offer it."""
        urls = [url for urls in self.engines.values() for url in urls]
        if not urls:
            return False
        emptied = True
        for url in urls:
            with Client(url) as engine:
                emptied &= engine.reset_prefix_cache()
        return emptied

    def retrieved_tokens(self) -> int | None:
        """Prompt tokens that the answering engines (decode, both) took from the cache so far, by their own count."""
        by_source = self.prompt_tokens_by_source("decode", "both")
        return None if by_source is None else by_source["external_kv_transfer"]

    def prompt_tokens_by_source(self, *roles: str) -> dict[str, int] | None:
        """Where the engines of these roles got their prompt tokens from so far, by vLLM's own count."""
        urls = [url for role in roles for url in self.engines.get(role, ())]
        if not urls:
            return None
        counts = dict.fromkeys(SOURCES, 0)
        for url in urls:
            with Client(url) as engine:
                metrics = engine.metrics()
            for source in SOURCES:
                counts[source] += int(total(metrics, "vllm:prompt_tokens_by_source_total", source=source))
        return counts

    def loaded_by_tier(self) -> dict[str, float]:
        """Bytes that engines loaded from the cache daemon so far, by tier."""
        if not self.admin_url:
            return {}
        with Client(self.admin_url) as admin:
            return by_label(admin.metrics(), "pdserve_cache_loaded_bytes_total", "tier")

    def cache_counters(self) -> CacheCounters:
        if not self.admin_url:
            return CacheCounters()
        with Client(self.admin_url) as admin:
            m = admin.metrics()
        return CacheCounters(
            stored_chunks=total(m, "pdserve_cache_stored_chunks_total"),
            loaded_chunks=total(m, "pdserve_cache_loaded_chunks_total"),
            loaded_bytes=total(m, "pdserve_cache_loaded_bytes_total"),
            digest_failures=total(m, "pdserve_cache_digest_failures_total"),
        )

    def wait_for_no_leases(self, seconds: float) -> str:
        """Waits until the daemon holds no lease and no reservation; what is left after `seconds`, or ""."""
        if not self.admin_url:
            return ""
        deadline = time.monotonic() + seconds
        while True:
            with Client(self.admin_url) as admin:
                m = admin.metrics()
            left = {k: total(m, f"pdserve_cache_{k}") for k in ("leases", "reservations")}
            if not any(left.values()):
                return ""
            if time.monotonic() > deadline:
                return ", ".join(f"{v:g} {k}" for k, v in left.items() if v)
            time.sleep(0.1)


@contextlib.contextmanager
def opened(
    name: str | None, *, plain: str | None = None, cache_admin: str | None = None, say: Say = print
) -> Iterator[Target]:
    """The deployment `name` means (a URL, a running one's name, a topology), with a plain engine to compare with."""
    if name is not None and "://" in name:
        found = _running_at(name)
        if found is None:
            if not plain:
                raise ConfigError(
                    "--plain", "missing", f"{name} is no deployment of this machine; give a plain engine."
                )
            yield Target(url=name, plain_url=plain, admin_url=cache_admin)
            return
        top = found
    else:
        top = _named(name)
    if _is_up(top):
        with _plain_beside(top, plain, say) as plain_url:
            yield Target.of(top, plain_url)
        return
    with started(top, plain=not plain, dev_mode=True, say=say) as own:
        yield Target.of(own, plain)


@contextlib.contextmanager
def started(
    top: Topology,
    *,
    plain: bool = False,
    dev_mode: bool = False,
    quiet: bool = True,
    keep: bool = False,
    say: Say = print,
) -> Iterator[Topology]:
    """Launches a topology, with a plain engine added if asked and missing, and stops it at the end (unless `keep`)."""
    with tempfile.TemporaryDirectory(prefix="pdserve-") as folder:
        file, own = write_variant(top, Path(folder), plain=plain, dev_mode=dev_mode)
        say(f"starting {own.name}: {len(own.instances)} engines")
        done = False
        try:
            launch(file, quiet=quiet)
            yield own
            done = True
        finally:
            if not (keep and done):
                stop(own.name)


def _plain_like(top: Topology) -> dict[str, Any]:
    """A plain engine that computes on as many cores as the engines it is compared with, on the same ones: they are asked in turn."""
    first = next(i for role in ("prefill", "both", "decode") for i in top.of(role))
    return {"port": free_port(), **({"cpus": first.cpus} if first.cpus else {})}


def write_variant(top: Topology, folder: Path, *, plain: bool, dev_mode: bool) -> tuple[Path, Topology]:
    """The topology's file again, with what a check needs: a plain engine, and engines that can empty their cache."""
    raw: dict[str, Any] = yaml.safe_load(Path(top.source).read_text())
    local = Path(top.source).parent / str(raw["model"])
    if local.is_dir():
        raw["model"] = str(local)
    if plain and not raw.get("plain"):
        raw["plain"] = [_plain_like(top)]
    if dev_mode:
        engine = raw.setdefault("engine", {})
        engine["env"] = {**(engine.get("env") or {}), "VLLM_SERVER_DEV_MODE": "1"}
    file = folder / f"{top.name}.yaml"
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    return file, topology.load(file)


def launch(file: Path, quiet: bool = True) -> None:
    """`pdserve launch FILE --detach`; it returns when everything is ready."""
    command = [sys.executable, "-P", "-m", "pdserve", "launch", str(file), "--detach"]
    pipe = subprocess.PIPE if quiet else None
    try:
        done = subprocess.run(command, stdout=pipe, stderr=pipe, text=True, timeout=START_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise StartError(f"{file.name} was not ready after {START_TIMEOUT:g} s") from None
    if done.returncode == 2:
        raise ConfigError("", (done.stderr or f"{file.name} was refused").strip().removeprefix("pdserve: "))
    if done.returncode != 0:
        raise StartError((done.stderr or f"{file.name} could not be started").strip())


def stop(name: str) -> None:
    command = [sys.executable, "-P", "-m", "pdserve", "stop", name]
    subprocess.run(command, capture_output=True, timeout=STOP_TIMEOUT, check=False)


def free_port() -> int:
    """Free now, and below the ports that the kernel hands out itself: nobody is given it before it is used."""
    for port in random.sample(range(20_000, 32_000), 1000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise StartError("no free port from 20000 to 32000")


def find_running(name: str | None) -> Target:
    """A deployment that runs now, by URL or name; without one, the only one there is. Nothing is started."""
    if name is not None and "://" in name:
        found = _running_at(name)
        return Target.of(found) if found else Target(url=name, plain_url="")
    up = [top for top in running() if name in (None, top.name)]
    fix = "Name one that runs (pdserve status lists them), or give a URL."
    if not up:
        raise NotRunning(f"{name or 'no deployment of this user'} does not run. {fix}")
    if len(up) > 1:
        raise ConfigError("target", f"{len(up)} deployments run", fix)
    return Target.of(up[0])


def running() -> list[Topology]:
    """The deployments of this user whose proxy answers now."""
    found = []
    for file in sorted(env.run_root().glob("*/topology.yaml")):
        try:
            top = topology.load(file)
        except PdserveError:
            continue  # an older version's leftover; not ours to judge here
        if _is_up(top):
            found.append(top)
    return found


def _is_up(top: Topology) -> bool:
    if top.proxy is None:
        return False
    with Client(top.proxy.url) as client:
        return client.healthy()


def _running_at(url: str) -> Topology | None:
    wanted = Client(url).url.replace("localhost", "127.0.0.1")
    return next((top for top in running() if top.proxy and top.proxy.url == wanted), None)


def _named(name: str | None) -> Topology:
    if name is None:
        up = running()
        if len(up) > 1:
            names = ", ".join(top.name for top in up)
            raise ConfigError("target", f"several deployments run: {names}", "Name one.")
        return up[0] if up else topology.load("local-cpu")
    return next((top for top in running() if top.name == name), None) or topology.load(name)


@contextlib.contextmanager
def _plain_beside(top: Topology, plain: str | None, say: Say) -> Iterator[str]:
    """A plain engine for a deployment that runs: the given one, its own, or one started with the same settings."""
    own = plain or next((i.url for i in top.of("plain")), None)
    if own:
        yield own
        return
    if any(i.engine.device != "cpu" for i in top.instances):
        raise ConfigError("--plain", "missing", "The GPUs are in use; start an engine without a connector and give it.")
    raw: dict[str, Any] = yaml.safe_load(Path(top.source).read_text())
    kept: dict[str, Any] = {key: raw[key] for key in ("model", "served_model_name", "engine") if key in raw}
    local = Path(top.source).parent / str(raw["model"])
    if local.is_dir():
        kept["model"] = str(local)
    name = f"{top.name[:32]}-plain"
    with tempfile.TemporaryDirectory(prefix="pdserve-") as folder:
        file = Path(folder) / f"{name}.yaml"
        content: dict[str, Any] = {"name": name, **kept, "plain": [_plain_like(top)]}
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        say("starting a plain engine with the same settings")
        try:
            launch(file)
            yield topology.load(file).instances[0].url
        finally:
            stop(name)

"""Where the list of peers comes from: written down, a DNS name whose addresses change, or etcd.

A source is asked again and again from one thread; each answer is the whole list, URL -> name. An answer that cannot be had
(SourceError) leaves the list as it was: a name server that is down for a minute makes nobody leave.
"""

from __future__ import annotations

import base64
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import msgspec

from pdserve.errors import CacheError, ConfigError

#: how long a peer may be silent before etcd takes its entry away
LEASE_S = 10
ETCD_S = 2.0


class SourceError(CacheError):
    """The list could not be had now."""


class Source(Protocol):
    def peers(self) -> dict[str, str]:
        """The list as it is now. Raises SourceError. May take a few seconds, not more."""

    def close(self) -> None:
        """Takes our own entry away where there is one."""


class Static:
    """The list that somebody wrote down: [NAME=]URL."""

    def __init__(self, entries: list[str]) -> None:
        self._peers: dict[str, str] = {}
        for i, entry in enumerate(entries):
            name, _, url = entry.rpartition("=")
            if not urlsplit(url).port or not urlsplit(url).hostname:
                raise ConfigError(
                    f"--peer[{i}]", f"{entry!r} is not [NAME=]URL", "Write it like b=tcp://10.0.0.2:7900."
                )
            self._peers[url] = name

    def peers(self) -> dict[str, str]:
        return self._peers

    def close(self) -> None:
        pass


class Dns:
    """All addresses behind a name, such as a headless service's: dns://NAME:PORT."""

    def __init__(
        self, host: str, port: int, scheme: str, resolve: Callable[[str, int], list[str]] | None = None
    ) -> None:
        self._host, self._port, self._scheme, self._resolve = host, port, scheme, resolve or _addresses

    def peers(self) -> dict[str, str]:
        try:
            found = self._resolve(self._host, self._port)
        except OSError as e:
            raise SourceError(f"{self._host}: {e}") from e
        return {f"{self._scheme}://{f'[{a}]' if ':' in a else a}:{self._port}": "" for a in sorted(set(found))}

    def close(self) -> None:
        pass


def _addresses(host: str, port: int) -> list[str]:
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class Etcd:
    """A prefix in etcd, one key for each daemon, ours kept alive by a lease: etcd://HOST:PORT/PREFIX.

    Spoken over etcd's own HTTP gateway, so that no client library is needed.
    """

    def __init__(self, address: str, prefix: str, own: str, name: str) -> None:
        import httpx

        self._prefix, self._own, self._name = prefix.strip("/") or "pdserve", own, name
        self._http = httpx.Client(base_url=f"http://{address}", timeout=ETCD_S, trust_env=False)
        self._failures: tuple[type[Exception], ...] = (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError)
        self._lease = ""

    def peers(self) -> dict[str, str]:
        try:
            self._keep()
            first = f"/{self._prefix}/".encode()
            end = first[:-1] + bytes([first[-1] + 1])
            reply = self._post("kv/range", {"key": _b64(first), "range_end": _b64(end), "limit": 4096})
            found = {}
            for entry in reply.get("kvs", ()):
                if (facts := _entry(entry.get("value", ""))) is not None:
                    found[facts.url] = facts.name
        except self._failures as e:
            raise SourceError(f"etcd: {type(e).__name__}: {e}") from e
        return found

    def _keep(self) -> None:
        """Our own entry is there and lives on."""
        if self._lease:
            reply = self._post("lease/keepalive", {"ID": self._lease})
            if int(reply.get("result", {}).get("TTL", 0)) > 0:
                return
        self._lease = str(self._post("lease/grant", {"TTL": LEASE_S})["ID"])
        value = msgspec.json.encode(_Entry(self._own, self._name))
        key = f"/{self._prefix}/{self._own}".encode()
        self._post("kv/put", {"key": _b64(key), "value": _b64(value), "lease": self._lease})

    def _post(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        reply = self._http.post(f"/v3/{path}", json=body)
        reply.raise_for_status()
        answer: dict[str, Any] = reply.json()
        return answer

    def close(self) -> None:
        if self._lease:
            try:
                self._post("lease/revoke", {"ID": self._lease})
            except self._failures:
                self._lease = ""  # it ends by itself
        self._http.close()


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class _Entry(msgspec.Struct, frozen=True):
    url: str
    name: str = ""


def _entry(value: str) -> _Entry | None:
    """Somebody else's key under the prefix is no peer, and no reason to believe nobody any more."""
    try:
        return msgspec.json.decode(base64.b64decode(value), type=_Entry)
    except (msgspec.MsgspecError, ValueError):
        return None


class Several:
    """Some of the above together. One that fails now keeps what it said last."""

    def __init__(self, sources: list[Source], told: Callable[[str], None] = lambda text: None) -> None:
        self._sources, self._told = sources, told
        self._last: list[dict[str, str]] = [{} for _ in sources]
        self._quiet_until = 0.0

    def peers(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for i, source in enumerate(self._sources):
            try:
                self._last[i] = source.peers()
            except SourceError as e:
                if time.monotonic() > self._quiet_until:
                    self._quiet_until = time.monotonic() + 30.0
                    self._told(f"the list of peers stays as it was: {e}")
            for url, name in self._last[i].items():
                found[url] = name or found.get(url, "")
        return found

    def close(self) -> None:
        for source in self._sources:
            source.close()


def build(peers: list[str], discover: str, own: str, name: str, told: Callable[[str], None]) -> Source:
    """What the options ask for: --peer [NAME=]URL ..., --peers-from dns://NAME:PORT | etcd://HOST:PORT/PREFIX."""
    sources: list[Source] = [Static(peers)]
    if discover:
        parts = urlsplit(discover)
        scheme = parse_qs(parts.query).get("transport", [urlsplit(own).scheme])[0]
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        fix = "Write dns://kv-peers.default.svc:7900 or etcd://10.0.0.1:2379/pdserve."
        if parts.scheme not in ("dns", "etcd") or not host or not port:
            raise ConfigError("--peers-from", f"{discover!r} is not a source of peers", fix)
        if parts.scheme == "dns":
            sources.append(Dns(host, port, scheme))
        elif urlsplit(own).hostname in ("0.0.0.0", "::"):
            raise ConfigError(
                "--peer-listen", f"{own} is no address that others can reach", "With etcd give the host's own address."
            )
        else:
            sources.append(Etcd(f"{host}:{port}", parts.path, own, name))
    return Several(sources, told)

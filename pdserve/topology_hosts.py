"""The part of a topology that spreads over several hosts: who they are, what runs where, how their caches reach each other.

With `hosts`, the word `host` of an engine and of the proxy names one of them instead of an address to listen on; every
process then listens on its host's own address. Each host with engines that use the cache has a cache daemon of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from pdserve.errors import ConfigError

if TYPE_CHECKING:
    from pdserve.topology import Instance, Topology

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """One machine. `address` is what the others reach it by."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
    address: str
    peer_url: str = (
        ""  # where its cache daemon is reached by the others; default: transport, address and port of `peers`
    )


class Peers(msgspec.Struct, frozen=True, kw_only=True):
    """How the cache daemons of several hosts talk."""

    transport: Literal["tcp", "ucx", "nixl"] = "tcp"
    port: Annotated[int, Meta(ge=1, le=65535)] = 7900
    discover: str = ""  # further peers, from a list that changes: dns://NAME:PORT or etcd://HOST:PORT/PREFIX
    secret_file: str = ""  # default: the variable PDSERVE_PEER_SECRET
    cert: str = ""
    key: str = ""
    ca: str = ""

    def url(self, host: Host) -> str:
        return host.peer_url or f"{self.transport}://{bracketed(host.address)}:{self.port}"


def bracketed(address: str) -> str:
    """As it stands in a URL."""
    return f"[{address}]" if ":" in address else address


def named(hosts: tuple[Host, ...], name: str, key: str) -> Host:
    """The host of that name. Raises ConfigError for `key`."""
    for host in hosts:
        if host.name == name:
            return host
    known = ", ".join(host.name for host in hosts)
    raise ConfigError(key, f"{name!r} is not one of the hosts", f"Name one of: {known}.")


def place(topology: Topology) -> Topology:
    """Puts every process on its host: `on` names it, `host` becomes its address. Without hosts nothing changes.

    Raises ConfigError for hosts that do not fit together.
    """
    check(topology)
    hosts, replace = topology.hosts, msgspec.structs.replace
    if not hosts:
        return topology
    instances = []
    for instance in topology.instances:
        if not instance.host:
            fix = f"Name one of: {', '.join(host.name for host in hosts)}."
            raise ConfigError(f"{instance.key}.host", "missing, and the topology has several hosts", fix)
        host = named(hosts, instance.host, f"{instance.key}.host")
        instances.append(replace(instance, on=host.name, host=host.address))
    proxy, on = topology.proxy, ""
    if proxy is not None:
        name = hosts[0].name if proxy.host in LOOPBACK else proxy.host
        host = named(hosts, name, "proxy.host")
        proxy, on = replace(proxy, host=host.address), host.name
    return replace(topology, instances=tuple(instances), proxy=proxy, proxy_on=on)


def check(topology: Topology) -> None:
    """The rules that only several hosts have."""
    names: dict[str, int] = {}
    addresses: dict[str, int] = {}
    for i, host in enumerate(topology.hosts):
        for seen, value, key in ((names, host.name, "name"), (addresses, host.address, "address")):
            if value in seen:
                fix = "Give each host its own."
                raise ConfigError(f"hosts[{i}].{key}", f"{value!r} is that of hosts[{seen[value]}], too", fix)
            seen[value] = i
        if not host.address or "/" in host.address or " " in host.address:
            raise ConfigError(f"hosts[{i}].address", f"{host.address!r} is not an address", "Write it like 10.0.0.1.")
        if host.address in (*LOOPBACK, "0.0.0.0", "::") and len(topology.hosts) > 1:
            problem = f"{host.address!r} cannot be reached by the other hosts"
            raise ConfigError(f"hosts[{i}].address", problem, "Give the address that they know this host by.")
    if topology.peers is not None and topology.peers.discover:
        kind = topology.peers.discover.partition("://")[0]
        if kind not in ("dns", "etcd"):
            fix = "Write dns://kv-peers.default.svc:7900 or etcd://10.0.0.1:2379/pdserve."
            raise ConfigError("peers.discover", f"{topology.peers.discover!r} is not a source of peers", fix)
    if topology.peers is not None and not topology.hosts:
        raise ConfigError("peers", "there are no hosts", "List them: hosts: [{name: a, address: 10.0.0.1}, ...].")


def engines_on(topology: Topology, host: str) -> tuple[Instance, ...]:
    return tuple(instance for instance in topology.instances if instance.on == host)


def has_daemon(topology: Topology, host: str) -> bool:
    """Whether a cache daemon runs on that host."""
    return any(topology.uses_cache(instance) for instance in engines_on(topology, host))


def only(topology: Topology, host: str) -> Topology:
    """What runs on that one host, as a topology of its own."""
    proxy = topology.proxy if topology.proxy_on == host else None
    cache = topology.cache if has_daemon(topology, host) else None
    return msgspec.structs.replace(topology, instances=engines_on(topology, host), proxy=proxy, cache=cache)

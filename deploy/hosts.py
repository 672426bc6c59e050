"""What a deployment over several hosts means for the one host that is planned: its name, its peers, what runs elsewhere. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.errors import ConfigError
from pdserve.topology import Topology
from pdserve.topology_hosts import LOOPBACK, Peers, bracketed, has_daemon

#: what may still be before it on another host: its cache
CACHE_SECONDS = 300.0


@dataclass(frozen=True)
class Elsewhere:
    """A process of another host, as far as this one must know it."""

    name: str
    role: str
    host: str
    url: str
    ready_url: str
    start_timeout: float = 900.0


def chosen(topology: Topology, host: str) -> str:
    """The host to plan for. Raises ConfigError when it must be said and is not, or the other way round."""
    names = [h.name for h in topology.hosts]
    if not names:
        if host:
            fix = "Run without --host, or list hosts in the topology."
            raise ConfigError("--host", f"{host!r}, but the topology has no hosts", fix)
        return ""
    if not host:
        fix = f"Run on each: pdserve launch ... --host {names[0]}. Or start all from here: --backend ray."
        raise ConfigError("--host", f"missing: this topology has the hosts {', '.join(names)}", fix)
    if host not in names:
        raise ConfigError("--host", f"{host!r} is not one of the hosts", f"Name one of: {', '.join(names)}.")
    return host


def label(topology: Topology, host: str) -> str:
    """Names the run directory and the shared memory of that host's part, so that two may share a machine."""
    return f"{topology.name}@{host}" if host else topology.name


def cache_name(host: str) -> str:
    return f"cache-{host}" if host else "cache"


def admin_urls(topology: Topology, host: str) -> dict[str, str]:
    """The daemons' HTTP addresses that can be reached from `host`, by process name."""
    cache = topology.cache
    if cache is None:
        return {}
    if not topology.hosts:
        return {"cache": cache.admin_url}
    open_ = cache.admin_host not in LOOPBACK
    return {
        cache_name(h.name): f"http://{bracketed(h.address)}:{cache.admin_port}" if open_ else cache.admin_url
        for h in topology.hosts
        if has_daemon(topology, h.name) and (open_ or h.name == host)
    }


def peer_words(topology: Topology, host: str, state_file: str) -> list[str]:
    """The options that make the daemon of `host` one of several."""
    daemons = [h for h in topology.hosts if has_daemon(topology, h.name)]
    peers = topology.peers or Peers()
    if len(daemons) < 2 and not peers.discover:
        return []
    own = next(h for h in daemons if h.name == host)
    words = ["--peer-listen", peers.url(own), "--host-name", host]
    for h in daemons:
        # The proxy names a host by the address of its engines; where the daemons meet elsewhere that is another name of it.
        names = h.name if not h.peer_url else f"{h.name},{h.address}"
        words += ["--peer", f"{names}={peers.url(h)}"]
    for flag, value in (
        ("--peers-from", peers.discover),
        ("--peer-secret-file", peers.secret_file),
        ("--peer-cert", peers.cert),
        ("--peer-key", peers.key),
        ("--peer-ca", peers.ca),
    ):
        words += [flag, value] if value else []
    return [*words, "--state", state_file]


def needs_secret(topology: Topology) -> bool:
    """Whether the daemons need PDSERVE_PEER_SECRET from the environment."""
    daemons = [h for h in topology.hosts if has_daemon(topology, h.name)]
    peers = topology.peers or Peers()
    return (len(daemons) > 1 or bool(daemons and peers.discover)) and not peers.secret_file


def elsewhere(topology: Topology, host: str) -> tuple[Elsewhere, ...]:
    """Every process of the other hosts. A daemon whose HTTP side is on loopback cannot be asked from here: no URL."""
    if not host:
        return ()
    urls = admin_urls(topology, host)
    found = []
    for h in topology.hosts:
        if h.name == host:
            continue
        if has_daemon(topology, h.name):
            url = urls.get(cache_name(h.name), "")
            ready = f"{url}/healthz" if url else ""
            found.append(Elsewhere(cache_name(h.name), "cache", h.name, url, ready, CACHE_SECONDS))
        for i in topology.instances:
            if i.on == h.name:
                timeout = CACHE_SECONDS + i.engine.start_timeout
                found.append(Elsewhere(i.name, i.role, h.name, i.url, f"{i.url}/health", timeout))
        if topology.proxy is not None and topology.proxy_on == h.name:
            proxy = topology.proxy.url
            found.append(Elsewhere("proxy", "proxy", h.name, proxy, f"{proxy}/health"))
    return tuple(found)

"""Makes a daemon one of several, as its options say (`pdserve cache serve --peer-listen ...`)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pdserve import env
from pdserve.errors import ConfigError
from pdserve.metrics.metric import build
from pdserve.metrics.peers import PEERS
from pdserve.transfer.peers import sources
from pdserve.transfer.peers.node import Node
from pdserve.transfer.transports import registry
from pdserve.transfer.transports.base import Local
from pdserve.transfer.transports.security import Security

if TYPE_CHECKING:
    from pdserve.transfer.daemon import Daemon


def attach(daemon: Daemon, args: argparse.Namespace) -> None:
    """Sets daemon.node where `args` has a peer_listen. Raises ConfigError; nothing is listened at yet."""
    listen = getattr(args, "peer_listen", None)
    if not listen:
        if getattr(args, "peer", None) or getattr(args, "peers_from", None):
            raise ConfigError(
                "--peer-listen", "missing", "Say where peers reach this daemon, e.g. tcp://10.0.0.1:7900."
            )
        return
    name = args.host_name or urlsplit(listen).hostname or ""
    security = Security(_secret(args.peer_secret_file), args.peer_cert or "", args.peer_key or "", args.peer_ca or "")
    node_metrics = build(PEERS, daemon.registry)
    daemon.node = Node(
        name=name,
        epoch=daemon.daemon_id,
        chunk_tokens=daemon.chunk_tokens,
        store=daemon.store,
        metrics=daemon.metrics | node_metrics,
        transport=registry.build(listen, Local(name, daemon.arena.bytes), security),
        listen=listen,
        source=lambda own: sources.build(args.peer, args.peers_from or "", own, name, daemon.log.warning),
        lower=daemon.tiering,
        after=daemon.journal.flush,
        state_file=Path(args.state) if args.state else None,
    )
    daemon.tiering.beyond = daemon.node.fetching


def _secret(file: str | None) -> bytes:
    """The shared secret: from a file, else from PDSERVE_PEER_SECRET."""
    if not file:
        secret = env.peer_secret()
        if not secret:
            fix = "Set PDSERVE_PEER_SECRET to the same text on every host, or give --peer-secret-file."
            raise ConfigError("peers.secret", "missing, and peers must prove who they are", fix)
        return secret.encode()
    try:
        return Path(file).read_bytes().strip()
    except OSError as e:
        raise ConfigError("peers.secret", f"{file} cannot be read: {e.strerror}", "Give a readable file.") from e

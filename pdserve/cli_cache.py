"""`pdserve cache serve|status|ls|clear|pin|scrub|check`."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import msgspec

from pdserve import env, log, output, trace
from pdserve.errors import ConfigError, NotRunning, PdserveError
from pdserve.topology import parse_size

EXAMPLES = """examples:
  pdserve cache serve --socket /tmp/cache.sock --size 2GiB --disk /var/lib/pdserve --disk-size 50GiB
  pdserve cache status --admin-port 8080
  pdserve cache ls --tier disk
  pdserve cache clear --salt tenant-1
  pdserve cache check /var/lib/pdserve          of a store whose daemon is stopped
"""
ANSWER_SECONDS = 15.0
MAX_CHUNK_TOKENS = 65536
WRITE_POLICIES = ("write-through", "on-evict", "selective")
_WRITE_HELP = "when a chunk is written down: at once, before it is evicted, or once it was used (default %(default)s)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="serve|status|ls|clear|pin|scrub|check")
    serve = actions.add_parser(
        "serve",
        help="run the cache daemon of this host",
        epilog=_example("serve --socket /tmp/cache.sock --size 2GiB --disk /var/lib/pdserve --disk-size 50GiB"),
    )
    serve.add_argument("--socket", required=True, metavar="PATH", help="unix socket that engines connect to")
    serve.add_argument("--size", required=True, help="shared memory to hold KV in, e.g. 2GiB")
    serve.add_argument("--chunk-tokens", type=int, default=256, help="tokens of a full chunk (default %(default)s)")
    serve.add_argument(
        "--name", default="cache", help="names the arena /dev/shm/pdserve-NAME.arena (default %(default)s)"
    )
    serve.add_argument("--policy", default="lru", help="what is evicted first, by name (default %(default)s)")
    log.add_argument(serve)
    trace.add_arguments(serve)
    _tiers(serve)
    _peers(serve)
    _admin(serve)
    status = actions.add_parser("status", help="what a running daemon holds", epilog=_example("status --json"))
    status.add_argument("--json", action="store_true", help="its answer as it is")
    ls = actions.add_parser("ls", help="list chunks", epilog=_example("ls --tier disk --limit 10"))
    ls.add_argument(
        "--tier", default="dram", help="dram, or a tier that can be listed, e.g. disk (default %(default)s)"
    )
    ls.add_argument("--limit", type=int, default=50, help="at most so many (default %(default)s)")
    ls.add_argument("--json", action="store_true", help="the daemon's answer as it is")
    text = "forget everything, or what one tenant stored, or one prefix"
    clear = actions.add_parser("clear", help=text, epilog=_example("clear --salt tenant-1"))
    which = clear.add_mutually_exclusive_group()
    which.add_argument("--salt", help="only what was stored under this cache_salt")
    which.add_argument("--prefix", metavar="KEY", help="only this chunk and what builds on it")
    which.add_argument("--shared", action="store_true", help="everything, also in tiers that other hosts use")
    text = "keep a prefix from being evicted for a while"
    pin = actions.add_parser("pin", help=text, epilog=_example("pin 1f0a... --seconds 600"))
    pin.add_argument("key", nargs="+", metavar="KEY", help="the last chunk of the prefix, as `ls` shows it")
    pin.add_argument("--seconds", type=float, default=300.0, help="how long (default %(default)s)")
    pin.add_argument("--undo", action="store_true", help="unpin these chunks instead")
    text = "verify every chunk of a running daemon now"
    scrub = actions.add_parser("scrub", help=text, epilog=_example("scrub --fast"))
    scrub.add_argument("--fast", action="store_true", help="as fast as it goes, not at the usual rate")
    for action in (clear, pin, scrub):
        action.add_argument("--json", action="store_true", help="the daemon's answer as it is")
    for action in (status, ls, clear, pin, scrub):
        _admin(action)
    text = "look through a disk tier whose daemon is stopped"
    check = actions.add_parser("check", help=text, epilog=_example("check /var/lib/pdserve --repair"))
    check.add_argument("--json", action="store_true", help="what was found, for programs")
    check.add_argument("folder", metavar="FOLDER", help="its --disk, or <run dir>/<name>/kv")
    check.add_argument("--repair", action="store_true", help="mark what is wrong as deleted; else nothing is changed")


def _example(words: str) -> str:
    return f"example: pdserve cache {words}"


def _tiers(serve: argparse.ArgumentParser) -> None:
    disk = serve.add_argument_group("lower tiers")
    disk.add_argument("--disk", metavar="FOLDER", help="keep chunks on this disk, too; needs --disk-size")
    disk.add_argument("--disk-size", metavar="SIZE", help="and never take more of it than this, e.g. 20GiB")
    disk.add_argument(
        "--disk-min-free", metavar="SIZE", default="1GiB", help="leave so much free (default %(default)s)"
    )
    disk.add_argument("--disk-write", choices=WRITE_POLICIES, default=WRITE_POLICIES[0], help=_WRITE_HELP)
    disk.add_argument("--tier", metavar="URL", action="append", default=[], help="a further tier: redis://, s3://, ...")
    disk.add_argument(
        "--scrub-rate", metavar="SIZE", default="32MiB", help="verify so much a second, hourly; 0: never (default %(default)s)"
    )  # fmt: skip


def _peers(serve: argparse.ArgumentParser) -> None:
    peers = serve.add_argument_group("other hosts")
    peers.add_argument(
        "--peer-listen", metavar="URL", help="where their daemons reach this one, e.g. tcp://10.0.0.1:7900"
    )
    peers.add_argument("--host-name", metavar="NAME", help="what this host is called (default: the address)")
    text = "the daemon of another host; may be repeated, and may name this one too"
    peers.add_argument("--peer", metavar="[NAME=]URL", action="append", default=[], help=text)
    text = "a list of peers that changes: dns://NAME:PORT (each of its addresses) or etcd://HOST:PORT/PREFIX"
    peers.add_argument("--peers-from", metavar="URL", help=text)
    text = "holds what all of them must know (default: the variable PDSERVE_PEER_SECRET)"
    peers.add_argument("--peer-secret-file", metavar="FILE", help=text)
    peers.add_argument("--peer-cert", metavar="FILE", help="TLS: this daemon's certificate (PEM)")
    peers.add_argument("--peer-key", metavar="FILE", help="TLS: its key")
    peers.add_argument("--peer-ca", metavar="FILE", help="TLS: who must have signed the peers' certificates")
    peers.add_argument("--state", metavar="FILE", help="the launcher's state.json, shown to peers for `pdserve status`")


def _admin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--admin-host", default="127.0.0.1", help="address of /healthz, /status, /metrics (default %(default)s)"
    )
    parser.add_argument("--admin-port", type=int, default=8080, help="and its port (default %(default)s)")


def main(args: argparse.Namespace) -> int:
    actions = {
        "serve": _serve,
        "status": _status,
        "ls": _ls,
        "clear": _clear,
        "pin": _pin,
        "scrub": _scrub,
        "check": _check,
    }
    return actions[args.action](args)  # fmt: skip


def _serve(args: argparse.Namespace) -> int:
    args.size = parse_size(args.size, "--size")
    if args.chunk_tokens < 16 or args.chunk_tokens % 16:
        raise ConfigError("--chunk-tokens", f"{args.chunk_tokens} is not a multiple of 16", "256 suits most engines.")
    if args.chunk_tokens > MAX_CHUNK_TOKENS:
        raise ConfigError(
            "--chunk-tokens", f"{args.chunk_tokens} is over {MAX_CHUNK_TOKENS}", "256 suits most engines."
        )
    if not 0 <= args.admin_port < 65536:
        raise ConfigError(
            "--admin-port", f"{args.admin_port} is no port", "Give one from 1 to 65535; 0 takes any that is free."
        )
    args.scrub_rate = parse_size(args.scrub_rate, "--scrub-rate")
    if args.disk:
        if not args.disk_size:
            raise ConfigError("--disk-size", "missing", "Say how much of the disk may be taken, e.g. 20GiB.")
        args.disk_size = parse_size(args.disk_size, "--disk-size")
        args.disk_min_free = parse_size(args.disk_min_free, "--disk-min-free")
    from pdserve.transfer import serving

    return serving.main(args)


def _status(args: argparse.Namespace) -> int:
    facts = _ask(args, "GET", "/status")
    if args.json:
        return output.print_json(facts)
    tiers, scrub, peers = facts.pop("tiers", {}), facts.pop("scrub", {}), facts.pop("peers", {})
    rows = [(key, ", ".join(value) if isinstance(value, list) else value) for key, value in facts.items()]
    for peer in peers.pop("peers", ()):
        rows.append(
            (f"peer {peer['name'] or peer['url']}", ", ".join(f"{k} {v}" for k, v in peer.items() if k != "name"))
        )
    for name, tier in {**tiers, "scrub": scrub, "peers": peers}.items():
        rows.append((name, ", ".join(f"{key} {value}" for key, value in tier.items())))
    output.table(("", ""), rows)
    return 0


def _ls(args: argparse.Namespace) -> int:
    listed = _ask(args, "GET", f"/cache/objects?limit={args.limit}&tier={urllib.parse.quote(args.tier)}")
    if args.json:
        return output.print_json(listed)
    # Whole keys, since `pin` and `clear --prefix` want them: with them 80 columns are full. --json has the parents, too.
    rows = [(c["key"], c["tokens"], f"{c['bytes'] / 2**20:.1f}") for c in listed["objects"]]
    output.table(("key", "tokens", "MiB"), rows, right=("tokens", "MiB"))
    print(f"{len(listed['objects'])} of {listed['total']} chunks in {args.tier}")
    return 0


def _clear(args: argparse.Namespace) -> int:
    query = urllib.parse.urlencode({k: v for k in ("salt", "prefix") if (v := getattr(args, k)) is not None})
    if args.shared:
        query = "shared=true"
    with output.steps() as progress:  # lower tiers get some seconds for it
        progress.step("clearing")
        done = _ask(args, "DELETE", f"/cache?{query}")
    if args.json:
        output.print_json(done)
        return 0 if done["finished"] else 1
    print(f"{done['dropped']} chunks dropped from memory")
    for name, result in done["tiers"].items():
        print(f"{result['deleted']} from {name}" + (f"; {result['left']}" if "left" in result else ""))
    for name in done["pending"]:
        print(f"{name} has not finished yet; it goes on", file=sys.stderr)
    return 0 if done["finished"] else 1


def _pin(args: argparse.Namespace) -> int:
    if args.undo:
        done = _ask(args, "POST", "/cache/unpin", {"keys": args.key})
        if args.json:
            return output.print_json(done)
        print(f"{done['unpinned']} chunks unpinned")
        return 0
    done = _ask(args, "POST", "/cache/pin", {"keys": args.key, "ttl_s": args.seconds})
    if args.json:
        output.print_json(done)
        return 1 if done["refused"] else 0
    print(f"{done['pinned']} chunks pinned for {args.seconds:g} s")
    if done["refused"]:
        print(f"{done['refused']} refused: {done['why']}", file=sys.stderr)
    return 1 if done["refused"] else 0


def _scrub(args: argparse.Namespace) -> int:
    done = _ask(args, "POST", f"/cache/scrub?fast={str(args.fast).lower()}")
    if args.json:
        return output.print_json(done)
    print("begun; `pdserve cache status` says how it goes")
    return 0


def _check(args: argparse.Namespace) -> int:
    from pdserve.transfer import fsck

    with output.steps() as progress:
        report = fsck.check(Path(args.folder), repair=args.repair, progress=progress.step)
    if args.json:
        output.print_json(msgspec.to_builtins(report))
        return 1 if len(report.problems) > report.repaired else 0
    for problem in report.problems:
        print(problem)
    print(
        f"{report.segments} segments, {report.chunks} chunks ({report.bytes / 2**30:.2f} GiB) as they should be, "
        f"{report.deleted} deleted, {len(report.problems)} problems, {report.repaired} repaired"
    )
    return 1 if len(report.problems) > report.repaired else 0


def _ask(args: argparse.Namespace, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    url = f"http://{args.admin_host}:{args.admin_port}{path}"
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, method=method)
    request.add_header("Content-Type", "application/json")
    if token := env.admin_token():
        request.add_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through the outside world's proxy
    try:
        with opener.open(request, timeout=ANSWER_SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            raise PdserveError(f"the cache daemon refused ({error.code}): {_said(error.read())}") from error
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise NotRunning(f"no cache daemon answers at {url}: {getattr(error, 'reason', error)}") from error


def _said(body: bytes) -> str:
    """The sentence in an answer of the daemon's; whatever else it is, as it is."""
    text = body.decode(errors="replace")
    try:
        detail = json.loads(text)["detail"]
    except (ValueError, KeyError, TypeError):
        return text[:500]
    return detail if isinstance(detail, str) else text[:500]

"""`pdserve cache serve` and `pdserve cache status`."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request

from pdserve.errors import ConfigError, PdserveError
from pdserve.topology import parse_size

EXAMPLES = """examples:
  pdserve cache serve --socket /tmp/cache.sock --size 2GiB
  pdserve cache status --admin-port 8080
"""
ANSWER_SECONDS = 5.0
WRITE_POLICIES = ("write-through", "on-evict", "selective")
_WRITE_HELP = "when a chunk is written down: at once, before it is evicted, or once it was used (default %(default)s)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="serve|status")
    serve = actions.add_parser("serve", help="run the cache daemon of this host")
    serve.add_argument("--socket", required=True, metavar="PATH", help="unix socket that engines connect to")
    serve.add_argument("--size", required=True, help="shared memory to hold KV in, e.g. 2GiB")
    serve.add_argument("--chunk-tokens", type=int, default=256, help="tokens of a full chunk (default %(default)s)")
    serve.add_argument(
        "--name", default="cache", help="names the arena /dev/shm/pdserve-NAME.arena (default %(default)s)"
    )
    serve.add_argument("--policy", default="lru", help="what is evicted first, by name (default %(default)s)")
    _tiers(serve)
    _admin(serve)
    status = actions.add_parser("status", help="what a running daemon holds")
    status.add_argument("--json", action="store_true", help="its answer as it is")
    _admin(status)


def _tiers(serve: argparse.ArgumentParser) -> None:
    disk = serve.add_argument_group("lower tiers")
    disk.add_argument("--disk", metavar="FOLDER", help="keep chunks on this disk, too; needs --disk-size")
    disk.add_argument("--disk-size", metavar="SIZE", help="and never take more of it than this, e.g. 20GiB")
    disk.add_argument(
        "--disk-min-free", metavar="SIZE", default="1GiB", help="leave so much free (default %(default)s)"
    )
    disk.add_argument("--disk-write", choices=WRITE_POLICIES, default=WRITE_POLICIES[0], help=_WRITE_HELP)
    disk.add_argument("--tier", metavar="URL", action="append", default=[], help="a further tier: redis://, s3://, ...")


def _admin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--admin-host", default="127.0.0.1", help="address of /healthz, /status, /metrics (default %(default)s)"
    )
    parser.add_argument("--admin-port", type=int, default=8080, help="and its port (default %(default)s)")


def main(args: argparse.Namespace) -> int:
    if args.action == "status":
        return _status(args)
    args.size = parse_size(args.size, "--size")
    if args.chunk_tokens < 16 or args.chunk_tokens % 16:
        raise ConfigError("--chunk-tokens", f"{args.chunk_tokens} is not a multiple of 16", "256 suits most engines.")
    if args.disk:
        if not args.disk_size:
            raise ConfigError("--disk-size", "missing", "Say how much of the disk may be taken, e.g. 20GiB.")
        args.disk_size = parse_size(args.disk_size, "--disk-size")
        args.disk_min_free = parse_size(args.disk_min_free, "--disk-min-free")
    from pdserve.transfer import daemon

    return daemon.main(args)


def _status(args: argparse.Namespace) -> int:
    url = f"http://{args.admin_host}:{args.admin_port}/status"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through the outside world's proxy
    try:
        with opener.open(url, timeout=ANSWER_SECONDS) as answer:
            facts = json.load(answer)
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise PdserveError(f"no cache daemon answers at {url}: {getattr(error, 'reason', error)}") from error
    if args.json:
        json.dump(facts, sys.stdout, indent=1)
        print()
        return 0
    for key, value in facts.items():
        print(f"{key:24} {value}")
    return 0

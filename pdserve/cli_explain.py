"""`pdserve explain`: why one request went as it did, from the proxy's record of it."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any
from urllib.parse import quote

import httpx

from pdserve import env, explain, output
from pdserve.deploy import state
from pdserve.errors import NotRunning, PdserveError

EXAMPLES = """examples:
  pdserve explain                        the latest request
  pdserve explain 6f0d4e1b9c             by its X-Request-Id
  pdserve explain my-id --url http://127.0.0.1:8000 --json
"""
WITHIN_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request", nargs="?", metavar="REQUEST_ID", help="its X-Request-Id (default: the latest request)")
    parser.add_argument("--url", metavar="URL", help="the proxy (default: that of the deployment that runs here)")
    parser.add_argument("--json", action="store_true", help="the record itself")


def main(args: argparse.Namespace) -> int:
    url = (args.url or _running()).rstrip("/")
    record = fetch(url, args.request)
    if args.json:
        return output.print_json(record)
    width = min(120, output.console().width)
    for line in explain.story(record):
        indent = " " * (len(line) - len(line.lstrip()))
        print(textwrap.fill(line.lstrip(), width, initial_indent=indent, subsequent_indent=indent * 2))
    return 0


def fetch(url: str, request: str | None) -> dict[str, Any]:
    """The record. Raises NotRunning or PdserveError."""
    token = env.admin_token()
    headers = {"authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(base_url=url, headers=headers, timeout=WITHIN_S, trust_env=False) as client:
        if request is None:
            latest = _get(client, "/admin/requests?limit=1")["requests"]
            if not latest:
                raise PdserveError(f"{url} has served no request yet")
            request = str(latest[0]["id"])
        return _get(client, f"/admin/requests/{quote(request)}")


def _get(client: httpx.Client, path: str) -> dict[str, Any]:
    try:
        reply = client.get(path)
    except httpx.HTTPError as e:
        raise NotRunning(f"the proxy at {client.base_url} does not answer ({e}). Give its address: --url URL") from e
    try:
        told: dict[str, Any] = reply.json()
    except ValueError as e:
        raise PdserveError(f"{client.base_url}{path} answered {reply.status_code}, and no JSON: is this a proxy?") from e
    if reply.status_code in (401, 403):
        raise PdserveError(f"{told['error']['message']} Set PDSERVE_ADMIN_TOKEN to the proxy's admin key.")
    if reply.status_code != 200:
        message = told.get("error", {}).get("message", f"status {reply.status_code}")
        raise PdserveError(f"{message} (the proxy keeps the latest 2000 requests; ids are in X-Request-Id)")
    return told


def _running() -> str:
    urls = {d.url for d in state.read_all() if d.supervisor_alive()}
    return urls.pop() if len(urls) == 1 else "http://127.0.0.1:8000"

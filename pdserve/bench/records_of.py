"""What pdserve's proxy knows about each request beyond its headers: tier, time loaded, time saved. Asked once, after a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from pdserve.bench.record import Record
from pdserve.bench.runner import Server

MOST = 2000  # a proxy remembers only so many; those it has forgotten stay unknown
DEADLINE = 10.0
ONE_BY_ONE = (
    30.0  # seconds that are spent on asking for single requests, with what the engines told the cache daemon of them
)


def fill_in(server: Server, records: Sequence[Record]) -> int:
    """Adds to the records what GET /admin/requests says of them; how many it knew. Nothing for servers that are not pdserve's."""
    wanted = {r.request_id: r for r in records if r.request_id and r.route}
    if not wanted:
        return 0
    headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    try:
        with httpx.Client(base_url=server.url, headers=headers, timeout=DEADLINE, trust_env=False) as http:
            answer = http.get("/admin/requests", params={"limit": min(MOST, len(records) + 100)})
            listed = answer.json().get("requests") or [] if answer.status_code == 200 else []
            there = {str(said.get("id", "")): said for said in listed}
            for name, said in _in_full(http, [name for name in wanted if name in there]):
                there[name] |= said
    except (httpx.HTTPError, ValueError):
        return 0
    for name, record in wanted.items():
        if name in there:
            _copy(record, there[name])
    return len(wanted.keys() & there.keys())


def _in_full(http: httpx.Client, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The list leaves out what has to be asked of daemons. As far as the time goes; what is left stays unknown."""
    until = time.monotonic() + ONE_BY_ONE
    for name in names:
        if time.monotonic() > until:
            return
        answer = http.get(f"/admin/requests/{name}")
        if answer.status_code != 200:
            continue
        said = answer.json()
        yield name, {key: said[key] for key in ("cached_tokens", "load_ms", "saved_ms") if said.get(key) is not None}


def _copy(record: Record, said: dict[str, Any]) -> None:
    tiers = said.get("cached_tokens")
    if isinstance(tiers, dict):
        record.tiers = {str(k): int(v) for k, v in tiers.items() if isinstance(v, int)}
    for name in ("load_ms", "saved_ms"):
        value = said.get(name)
        if isinstance(value, int | float):
            setattr(record, name, float(value))
    record.route, record.reason = said.get("route") or record.route, said.get("reason") or record.reason

"""What pdserve's proxy knows about each request beyond its headers: tier, time loaded, time saved. Asked once, after a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from pdserve.bench.record import Record
from pdserve.bench.runner import Server

MOST = 2000  # a proxy remembers only so many; those it has forgotten stay unknown
DEADLINE = 10.0


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
    except (httpx.HTTPError, ValueError):
        return 0
    known = 0
    for said in listed:
        record = wanted.get(str(said.get("id", "")))
        if record is not None:
            known += 1
            _copy(record, said)
    return known


def _copy(record: Record, said: dict[str, Any]) -> None:
    tiers = said.get("cached_tokens")
    if isinstance(tiers, dict):
        record.tiers = {str(k): int(v) for k, v in tiers.items() if isinstance(v, int)}
    for name in ("load_ms", "saved_ms"):
        value = said.get(name)
        if isinstance(value, int | float):
            setattr(record, name, float(value))
    record.route, record.reason = said.get("route") or record.route, said.get("reason") or record.reason

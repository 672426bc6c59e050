from __future__ import annotations

import asyncio
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from pdserve.errors import ConfigError, RequestError
from pdserve.proxy.keys import Key, hashed, parsed, read

HASH = {name: sha256(name.encode()).hexdigest() for name in ("k-alice", "k-bob")}


def test_hashes_only_and_limits_by_name() -> None:
    keys = parsed(["# who", "", f"alice {HASH['k-alice']} streams=2 weight=3", f"bob {HASH['k-bob'].upper()}"], "f")
    key, left = keys.admit([(b"x-pdserve-key", b"k-alice"), (b"authorization", b"Bearer theirs")])
    assert (key.name, key.streams, key.weight) == ("alice", 2, 3.0)
    assert left == [(b"authorization", b"Bearer theirs")]
    key, left = keys.admit([(b"authorization", b"bearer k-bob"), (b"accept", b"*/*")])
    assert (key.name, left) == ("bob", [(b"accept", b"*/*")])
    for wrong in (
        [],
        [(b"authorization", b"Bearer k-eve")],
        [(b"authorization", b"Basic x")],
        [(b"x-pdserve-key", b"")],
    ):
        with pytest.raises(RequestError) as refused:
            keys.admit(wrong)
        assert refused.value.status == 401


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("alice", "f:1: a line is a name"),
        ("alice k-alice", "f:1: a line is a name"),
        (f"alice {HASH['k-alice']} speed=3", "'speed' is not known"),
        (f"alice {HASH['k-alice']} streams=many", "'streams=many' is not a number"),
        (f"alice {HASH['k-alice']} weight=0", "'weight=0' is out of range"),
        (f"alice {HASH['k-alice']} weight=nan", "'weight=nan' is out of range"),
        (f"alice {HASH['k-alice']} ttft=inf", "'ttft=inf' is out of range"),
    ],
)
def test_a_wrong_line_is_named(line: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parsed([line], "f")


def let_in(key: Key, now: float) -> bool:
    try:
        key.take(now)
    except RequestError as refused:
        return refused.code != "rate_limit_exceeded"
    return True


def test_so_many_a_minute() -> None:
    key = Key("a", per_minute=60)
    passed = sum(let_in(key, float(second)) for second in range(1, 31) for _ in range(7))
    assert passed == 6 + 29  # what may come at once, and one a second


async def _streams(rig: Any, tmp_path: Path, until: Any, hold: Any) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice {HASH['k-alice']} streams=1\n")
    async with rig(api_keys=str(file)) as r:
        assert (await r.complete()).status == 401
        go = hold(r.d)
        first = asyncio.create_task(r.post("/v1/completions", {"prompt": "a"}, X_Pdserve_Key="k-alice"))
        await until(lambda: bool(r.d.seen))
        second = await r.post("/v1/completions", {"prompt": "a"}, Authorization="Bearer k-alice")
        assert (second.status, second.headers["retry-after"]) == (429, "1")
        assert second.json()["error"]["code"] == "too_many_streams"
        go.set()
        assert (await first).status == 200
        third = await r.post("/v1/completions", {"prompt": "a"}, Authorization="Bearer k-alice", X_Other="1")
        assert third.status == 200
        assert "authorization" not in r.d.seen[-1].headers
        assert "x-pdserve-key" not in r.d.seen[0].headers
        assert r.value("pdserve_requests_refused_total", reason="too_many_streams") == 1


@pytest.mark.anyio
async def test_streams_at_once_and_keys_that_stay_here(rig: Any, tmp_path: Path, until: Any, hold: Any) -> None:
    await _streams(rig, tmp_path, until, hold)


def test_keys_of_the_environment_and_the_file_add_up(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"alice {hashed(b'a')}\n")
    found = read(str(path), f"bob {hashed(b'b')} streams=2 class=batch; carol {hashed(b'c')}")
    assert {key.name for key in found.by_hash.values()} == {"alice", "bob", "carol"}
    bob = found.by_hash[hashed(b"b")]
    assert (bob.streams, bob.slo) == (2, "batch")
    assert not read("", "").by_hash
    with pytest.raises(ConfigError, match="no key"):
        read("", " ; # nothing")
    with pytest.raises(ConfigError, match="PDSERVE_API_KEYS:1"):
        read("", "bob plain-text-key")
    with pytest.raises(ConfigError, match="twice"):
        read(str(path), f"again {hashed(b'a')}")


@pytest.mark.anyio
async def test_a_key_of_the_environment_is_asked_for(rig: Any) -> None:
    async with rig(api_keys_env=f"bob {hashed(b'b')}") as r:
        assert (await r.complete()).status == 401
        reply = await r.post("/v1/completions", {"prompt": "a"}, X_Pdserve_Key="b", Authorization="Bearer engines")
        assert reply.status == 200
        assert r.d.seen[0].headers["authorization"] == "Bearer engines"
        assert "x-pdserve-key" not in r.d.seen[0].headers

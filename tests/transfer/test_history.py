"""Sixteen clients, mixed operations, one daemon: each answer must fit a moment between its question and itself."""

import os
import random
import threading
import time
from collections import defaultdict
from multiprocessing import get_context
from types import SimpleNamespace

from ports import free_port

from pdserve.errors import CacheUnavailable
from pdserve.transfer import arena, serving, wire
from pdserve.transfer.client import CacheClient

KEYS, CLIENTS, STEPS = 6, 16, 150


def key(i):
    return bytes([i]) * 32


def test_lookups_are_linearizable(tmp_path):
    """A commit writes a digest that no other commit has, so a lookup says which commit it has seen; a chunk that is reported
    corrupt is removed. Memory is large enough: nothing else removes one."""
    name = f"history-{os.getpid()}"
    port = free_port()
    args = SimpleNamespace(
        socket=str(tmp_path / "c.sock"),
        size=1 << 20,
        chunk_tokens=256,
        admin_host="127.0.0.1",
        admin_port=port,
        name=name,
    )
    process = get_context("spawn").Process(target=serving.main, args=(args,))
    process.start()
    events, errors = [], []
    try:
        _wait_for(args.socket)
        threads = [threading.Thread(target=_client, args=(args.socket, n, events, errors)) for n in range(CLIENTS)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(120)
        assert not errors, errors[0]
    finally:
        process.terminate()
        process.join(60)
        process.close()
        arena.path_for(name).unlink(missing_ok=True)
    assert sum(e[0] == "saw" for e in events) > CLIENTS * STEPS / 4
    _check(events)


def _wait_for(path):
    ends = time.monotonic() + 90
    client = CacheClient(path, "first")
    while True:
        try:
            client.ping(5)
            client.close()
            return
        except CacheUnavailable:
            assert time.monotonic() < ends
            time.sleep(0.1)


def _client(path, n, events, errors):
    rng = random.Random(n)
    client = CacheClient(path, f"client-{n}")

    def timed(call):
        began = time.monotonic()
        return call(), began, time.monotonic()

    try:
        for step in range(STEPS):
            i = rng.randrange(KEYS)
            value = (n << 32) | (step + 1)
            what = rng.random()
            if what < 0.35:
                (grant,) = client.reserve(f"w{n}", [wire.ReserveItem(key(i), b"", 0, 1, 4096, 256)], 30)
                if grant.status == wire.GRANTED:
                    if rng.random() < 0.1:
                        client.abort([grant.reservation], 30)
                        continue
                    count, began, ended = timed(
                        lambda g=grant, v=value: client.commit([wire.CommitItem(g.reservation, v)], 30)
                    )
                    assert count == 1
                    events.append(("wrote", i, value, began, ended))
            else:
                reply, began, ended = timed(lambda i=i: client.lookup([key(i)], 30))
                events.append(("saw", i, reply.found[0].digests[0] if reply.found else None, began, ended))
                if reply.found:
                    corrupt = [key(i)] if what > 0.85 else []
                    _, began, ended = timed(lambda r=reply, c=corrupt: client.release(r.lease, 30, 0, 0, c))
                    if corrupt:
                        events.append(("removed", i, None, began, ended))
    except Exception as e:  # noqa: BLE001 - told to the test
        errors.append(e)
    finally:
        client.close()


def _check(events):
    by_key = defaultdict(lambda: defaultdict(list))
    for what, i, value, began, ended in events:
        by_key[i][what].append((value, began, ended))
    for history in by_key.values():
        writes = {value: (began, ended) for value, began, ended in history["wrote"]}
        removals = [(began, ended) for _, began, ended in history["removed"]]
        for value, began, ended in history["saw"]:
            if value is not None:
                assert value in writes, "a digest that nobody committed"
                w_began, w_ended = writes[value]
                assert w_began < ended, "seen before it was committed"
                assert not any(w_ended < r_began and r_ended < began for r_began, r_ended in removals), (
                    "seen after it was removed"
                )
            else:
                for w_began, w_ended in writes.values():
                    gone = any(r_ended > w_began and r_began < ended for r_began, r_ended in removals)
                    assert gone or not w_ended < began, "committed, not removed, and not seen"

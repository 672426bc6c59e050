"""Rules of a tier that is well: what is put in comes out, and nothing else."""

from __future__ import annotations

import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pdserve.chunk import KEY_BYTES
from pdserve.transfer.tiers.base import TierError
from pdserve.transfer.tiers.conformance.subject import (
    PATIENCE_S,
    Subject,
    eventually,
    is_whole,
    make_chunk,
    opened,
    read,
    record_of,
    soon,
    space_for,
)


def bytes_in_are_bytes_out(subject: Subject) -> None:
    with opened(subject) as tier:
        for size in subject.shard_sizes:
            for shards in (1, 3):
                record, payload = make_chunk(size, shards)
                assert tier.put(record, payload, soon()) is True, f"{shards} x {size} bytes were refused"
                assert tier.contains([record.key]) == [record]
                back = read(tier, record)
                assert back is not None, f"{shards} x {size} bytes are gone"
                for sent, got in zip(payload, back, strict=True):
                    assert np.array_equal(sent, got), f"{shards} x {size} bytes came back as others"


def neighbours_are_not_touched(subject: Subject) -> None:
    """The arrays to read to are cut out of the arena: nothing beside them is written."""
    with opened(subject) as tier:
        record, payload = make_chunk(subject.shard_sizes[0] - 3, 2)
        tier.put(record, payload, soon())
        into = space_for(record)
        assert tier.get(record, into, soon())
        whole = into[0].base
        assert isinstance(whole, np.ndarray)
        gap = whole[record.shard_bytes : record.shard_bytes + 64]
        assert (gap == 0xA5).all()


def a_new_tier_finds_what_an_old_one_stored(subject: Subject) -> None:
    record, payload = make_chunk(subject.shard_sizes[0], 2)
    with opened(subject) as other, opened(subject) as tier:
        assert other.put(record, payload, soon())
        assert tier.contains([record.key]) == [record]
        back = read(tier, record)
        assert back is not None
        assert is_whole(record, back)


def what_was_never_stored_is_absent(subject: Subject) -> None:
    with opened(subject) as tier:
        record, _ = make_chunk(4096)
        assert tier.contains([]) == []
        assert tier.contains([record.key]) == [None]
        assert read(tier, record) is None
        assert tier.delete([record.key]) == 0
        assert tier.delete([]) == 0


def contains_answers_in_order(subject: Subject) -> None:
    with opened(subject) as tier:
        chunks = [make_chunk(512) for _ in range(5)]
        for record, payload in chunks[::2]:
            assert tier.put(record, payload, soon())
        found = tier.contains([record.key for record, _ in chunks])
        assert found == [record if i % 2 == 0 else None for i, (record, _) in enumerate(chunks)]
        many = [secrets.token_bytes(KEY_BYTES) for _ in range(subject.many_keys)]
        assert tier.contains([*many, chunks[0][0].key]) == [None] * len(many) + [chunks[0][0]]


def deleted_is_gone(subject: Subject) -> None:
    with opened(subject) as tier:
        (one, one_payload), (two, two_payload) = make_chunk(4096), make_chunk(4096, 2)
        tier.put(one, one_payload, soon())
        tier.put(two, two_payload, soon())
        assert eventually(lambda: tier.delete([one.key]) == 1, subject.settles_s)
        assert eventually(lambda: tier.contains([one.key, two.key]) == [None, two], subject.settles_s)
        assert read(tier, one) is None
        assert tier.put(one, one_payload, soon())
        assert read(tier, one) is not None


def what_it_lists_is_what_it_has(subject: Subject) -> None:
    """Of tiers that can list: every chunk, also another process's, and none that was deleted."""
    with opened(subject) as tier:
        if not hasattr(tier, "listing") or tier.listing(soon()) is None:
            return
        chunks = [make_chunk(512, 1 + i % 2) for i in range(4)]
        for record, payload in chunks:
            assert tier.put(record, payload, soon())
        assert eventually(lambda: tier.delete([chunks[0][0].key]) == 1, subject.settles_s)
        listed = {record.key: record for record in tier.listing(soon())}
        assert [listed.get(record.key) for record, _ in chunks] == [None, *(record for record, _ in chunks[1:])]
        try:
            list(tier.listing(time.monotonic() - 1.0))
        except TierError:
            return
        raise AssertionError("a listing after its deadline did not raise TierError")


def the_same_again_is_fine(subject: Subject) -> None:
    with opened(subject) as tier:
        record, payload = make_chunk(subject.shard_sizes[0], 2)
        for _ in range(3):
            assert tier.put(record, payload, soon()) is True
        back = read(tier, record)
        assert back is not None
        assert is_whole(record, back)


def of_two_writers_of_a_key_one_is_whole(subject: Subject) -> None:
    """Two engines compute the same chunk with different rounding: either is right, a mixture is not."""
    with opened(subject) as tier:
        first, payload = make_chunk(subject.shard_sizes[0], 2)
        other_payload = [part[::-1].copy() for part in payload]
        other = record_of(first.key, other_payload)
        assert tier.put(first, payload, soon())
        tier.put(other, other_payload, soon())
        (found,) = tier.contains([first.key])
        assert found in (first, other)
        assert found is not None
        back = read(tier, found)
        assert back is not None
        assert is_whole(found, back)
        # Whoever still holds the other record gets a miss or its own bytes, not those of the winner.
        lost = other if found == first else first
        back = read(tier, lost)
        assert back is None or is_whole(lost, back)


def many_threads_at_once(subject: Subject) -> None:
    chunks = [make_chunk(20_000 + 977 * i, 1 + i % 3) for i in range(12)]
    with opened(subject) as tier:
        start = threading.Barrier(6)

        def work(seed: int) -> int:
            rng = np.random.default_rng(seed)
            start.wait(PATIENCE_S)
            for i in rng.permutation(len(chunks)):
                record, payload = chunks[i]
                assert tier.put(record, payload, soon())
                back = read(tier, record)
                assert back is not None
                assert is_whole(record, back)
                assert tier.contains([record.key])[0] is not None
            return sum(found is not None for found in tier.contains([r.key for r, _ in chunks]))

        with ThreadPoolExecutor(6) as threads:
            assert list(threads.map(work, range(6))) == [len(chunks)] * 6


def stats_say_how_it_is(subject: Subject) -> None:
    with opened(subject) as tier:
        record, payload = make_chunk(1000)
        tier.put(record, payload, soon())
        stats = tier.stats()
        for name in ("chunks", "used_bytes", "capacity_bytes"):
            assert isinstance(stats[name], int), name
            assert stats[name] >= 0, name  # type: ignore[operator]
        assert stats["state"] == "ok"
        assert tier.name
        assert tier.name.isidentifier()

"""Rules of a tier whose writer, bytes or backend fail: a miss or an error in time, never a wrong answer."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from pdserve.chunk import KEY_BYTES
from pdserve.transfer.tiers.base import ChunkRecord, CorruptChunk, Tier, TierError
from pdserve.transfer.tiers.conformance.subject import (
    PATIENCE_S,
    Subject,
    eventually,
    is_whole,
    make_chunk,
    opened,
    read,
    soon,
    space_for,
    works,
)

#: a call whose deadline is near has to be back after this: a bound against hanging, not a measure of speed
HANG_S = 60.0


def half_a_chunk_is_never_seen(subject: Subject) -> None:
    with opened(subject) as tier:
        for size in (subject.shard_sizes[0], subject.shard_sizes[-1]):
            record, payload = make_chunk(size, 2)
            subject.break_put(tier, record, payload)
            with opened(subject) as other:
                for eyes in (tier, other):
                    seen = eyes.contains([record.key]) != [None]
                    back = _read_or_miss(eyes, record)
                    # What was cut off at the very end may have arrived after all: then it is whole.
                    assert back is not None or not seen, "seen, but half of it is missing"
                    assert back is None or is_whole(record, back), "half a chunk is visible"
            assert tier.put(record, payload, soon())
            back = read(tier, record)
            assert back is not None
            assert is_whole(record, back)


def _read_or_miss(tier: Tier, record: ChunkRecord) -> list[np.ndarray] | None:
    """None: nothing is there, or what is there is known to be damaged."""
    try:
        return read(tier, record)
    except CorruptChunk:
        return None


def a_flipped_byte_is_noticed(subject: Subject) -> None:
    """The bytes differ from their digests, or the tier says so itself; never a crash, never silence."""
    with opened(subject) as tier:
        for shards in (1, 3):
            record, payload = make_chunk(subject.shard_sizes[0] + 5, shards)
            for position in {0, record.shard_bytes // 2, record.payload_bytes - 1}:
                _delete(tier, record.key)
                assert tier.put(record, payload, soon())
                subject.flip(record, position)
                try:
                    back = read(tier, record)
                except CorruptChunk:
                    continue
                assert back is None or not is_whole(record, back), f"the flip of byte {position} was not seen"


def _delete(tier: Tier, key: bytes) -> None:
    assert eventually(lambda: tier.delete([key]) >= 0 and tier.contains([key]) == [None], PATIENCE_S)


def a_corrupt_chunk_can_be_replaced(subject: Subject) -> None:
    """The caller that found wrong bytes deletes the chunk; what is put then is what comes back."""
    with opened(subject) as tier:
        record, payload = make_chunk(subject.shard_sizes[0])
        assert tier.put(record, payload, soon())
        subject.flip(record, 7)
        tier.delete([record.key])
        assert eventually(lambda: tier.contains([record.key]) == [None], subject.settles_s)
        assert tier.put(record, payload, soon())
        back = read(tier, record)
        assert back is not None
        assert is_whole(record, back)


def a_deadline_that_has_passed_is_an_error(subject: Subject) -> None:
    with opened(subject) as tier:
        record, payload = make_chunk(subject.shard_sizes[0])
        assert tier.put(record, payload, soon())
        for call in (tier.get, tier.put):
            try:
                call(record, space_for(record) if call == tier.get else payload, time.monotonic() - 1.0)
            except TierError:
                continue
            raise AssertionError("a call after its deadline did not raise TierError")


def a_silent_backend_costs_the_deadline_and_no_more(subject: Subject) -> None:
    with opened(subject) as tier:
        record, payload = make_chunk(subject.shard_sizes[0])
        fresh, fresh_payload = make_chunk(subject.shard_sizes[-1])
        assert tier.put(record, payload, soon())
        stalled = subject.stalled(tier)
        if stalled is None:
            return
        into = space_for(record)
        with stalled:  # type: ignore[attr-defined]
            for name, call in (
                ("get", lambda: tier.get(record, into, time.monotonic() + 0.3)),
                ("put", lambda: tier.put(fresh, fresh_payload, time.monotonic() + 0.3)),
                ("contains", lambda: tier.contains([record.key])),
                ("delete", lambda: tier.delete([record.key])),
                ("get", lambda: tier.get(record, into, time.monotonic() + 0.3)),
            ):
                _raises_in_time(name, call)
            # The caller has its arrays back: whatever still arrives must not land in them.
            for part in into:
                part[:] = 0x5A
            for part in fresh_payload:
                part[:] = 0
        assert eventually(lambda: works(tier, 2.0), PATIENCE_S), (
            "the tier does not work again after the backend came back"
        )
        assert all((part == 0x5A).all() for part in into), "the tier wrote after its call had ended"
        if tier.contains([fresh.key]) == [fresh]:
            back = read(tier, fresh)
            assert back is None or is_whole(fresh, back), "the tier read the payload after its call had ended"


def nobody_there_is_an_error(tier: Tier) -> str:
    """For a tier whose server does not exist; not one of RULES, since their subjects have one. Returns the tier's state."""
    try:
        _raises_in_time("contains", lambda: tier.contains([bytes(KEY_BYTES)]))
        return str(tier.stats()["state"])
    finally:
        tier.close()


def _raises_in_time(name: str, call: Callable[[], object]) -> None:
    started = time.monotonic()
    try:
        call()
    except TierError:
        took = time.monotonic() - started
        assert took < HANG_S, f"{name} took {took:.1f} s to give up"
        return
    raise AssertionError(f"{name} of a silent backend did not raise TierError")

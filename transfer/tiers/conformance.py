"""What every tier must do, one function per rule. An outside tier runs it too:

    @pytest.mark.parametrize("rule", conformance.RULES, ids=conformance.name_of)
    def test_rule(rule, subject):
        rule(subject)

Each rule opens the tier itself, uses keys of its own, and leaves nothing behind but chunks in the backend.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pdserve import kernels
from pdserve.chunk import FORMAT_VERSION, KEY_BYTES
from pdserve.transfer.tiers.base import ChunkRecord, CorruptChunk, Tier, TierError

#: longer than any answer of a backend that is well, on a busy machine
PATIENCE_S = 30.0
#: a call whose deadline is near has to be back after this: a bound against hanging, not a measure of speed
HANG_S = 60.0


class Subject:
    """A tier under test and what can be done to its backend. Subclass it; all but `stalled` must be there."""

    #: bytes of a shard: the first is the one used where only one is needed
    shard_sizes = (65536, 1, 4096, 70001, 1 << 20)
    #: how many keys to ask for at once
    many_keys = 300
    #: what deleting or losing a chunk may take to show (a store may hold a lease on what was just read)
    settles_s = 0.0
    #: tiers whose library starts threads or files that it never ends
    leaves_threads = False

    def open(self) -> Tier:
        """A tier over the same backend each time."""
        raise NotImplementedError

    def break_put(self, tier: Tier, record: ChunkRecord, payload: list[np.ndarray]) -> None:
        """Puts, and sees to it that the writer is cut off after some bytes of the payload have gone."""
        raise NotImplementedError

    def flip(self, record: ChunkRecord, position: int) -> None:
        """Changes one byte of the stored payload behind the tier's back."""
        raise NotImplementedError

    def stalled(self, tier: Tier) -> object | None:
        """A context manager in which the backend does not answer; None where that cannot be arranged."""
        return None


# ---- chunks to work with ----


def make_chunk(shard_bytes: int, shards: int = 1) -> tuple[ChunkRecord, list[np.ndarray]]:
    """Fresh random bytes and the record that goes with them."""
    payload = [np.frombuffer(secrets.token_bytes(shard_bytes), np.uint8).copy() for _ in range(shards)]
    return record_of(secrets.token_bytes(KEY_BYTES), payload), payload


def record_of(key: bytes, payload: list[np.ndarray]) -> ChunkRecord:
    digests = [kernels.digest(part) for part in payload]
    parent, tag = secrets.token_bytes(KEY_BYTES), secrets.token_bytes(16)
    return ChunkRecord(FORMAT_VERSION, key, parent, 256, payload[0].nbytes, digests, tag)


def space_for(record: ChunkRecord) -> list[np.ndarray]:
    """Where a chunk is read to: slices of one larger array, as they are in the arena, filled with something else."""
    stride = record.shard_bytes + 64
    whole = np.full(stride * len(record.digests), 0xA5, np.uint8)
    return [whole[i * stride : i * stride + record.shard_bytes] for i in range(len(record.digests))]


def soon() -> float:
    return time.monotonic() + PATIENCE_S


def read(tier: Tier, record: ChunkRecord) -> list[np.ndarray] | None:
    """The chunk's shards; None when the tier says that it is gone."""
    into = space_for(record)
    return into if tier.get(record, into, soon()) else None


def is_whole(record: ChunkRecord, shards: list[np.ndarray]) -> bool:
    return [kernels.digest(part) for part in shards] == record.digests


@contextmanager
def opened(subject: Subject) -> Iterator[Tier]:
    tier = subject.open()
    try:
        yield tier
    finally:
        tier.close()


def eventually(what: Callable[[], bool], patience: float) -> bool:
    ends = time.monotonic() + patience
    while not what():
        if time.monotonic() > ends:
            return False
        time.sleep(0.02)
    return True


# ---- the rules ----


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


def nobody_there_is_an_error(tier: Tier) -> str:
    """For a tier whose server does not exist; not one of RULES, since their subjects have one. Returns the tier's state."""
    try:
        _raises_in_time("contains", lambda: tier.contains([bytes(KEY_BYTES)]))
        return str(tier.stats()["state"])
    finally:
        tier.close()


def _read_or_miss(tier: Tier, record: ChunkRecord) -> list[np.ndarray] | None:
    """None: nothing is there, or what is there is known to be damaged."""
    try:
        return read(tier, record)
    except CorruptChunk:
        return None


def _delete(tier: Tier, key: bytes) -> None:
    assert eventually(lambda: tier.delete([key]) >= 0 and tier.contains([key]) == [None], PATIENCE_S)


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
        assert eventually(lambda: _works(tier, 2.0), PATIENCE_S), "the tier does not work again after the backend came back"
        assert all((part == 0x5A).all() for part in into), "the tier wrote after its call had ended"
        if tier.contains([fresh.key]) == [fresh]:
            back = read(tier, fresh)
            assert back is None or is_whole(fresh, back), "the tier read the payload after its call had ended"


def _raises_in_time(name: str, call: Callable[[], object]) -> None:
    started = time.monotonic()
    try:
        call()
    except TierError:
        took = time.monotonic() - started
        assert took < HANG_S, f"{name} took {took:.1f} s to give up"
        return
    raise AssertionError(f"{name} of a silent backend did not raise TierError")


def _works(tier: Tier, patience: float = PATIENCE_S) -> bool:
    record, payload = make_chunk(1000)
    try:
        return tier.put(record, payload, time.monotonic() + patience) and read(tier, record) is not None
    except TierError:
        return False


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


def closing_ends_threads_and_files(subject: Subject) -> None:
    with opened(subject) as tier:  # what a library opens once and for all is not counted
        _works(tier)
    if subject.leaves_threads:
        return
    files, threads = _open_files(), threading.active_count()
    for _ in range(3):
        with opened(subject) as tier:
            assert _works(tier)
        tier.close()  # twice is once
    assert eventually(lambda: threading.active_count() <= threads, PATIENCE_S), "threads are left"
    assert eventually(lambda: _open_files() <= files, PATIENCE_S), "files or sockets are left"


def after_close_it_refuses(subject: Subject) -> None:
    with opened(subject) as tier:
        record, _ = make_chunk(100)
    try:
        found = read(tier, record)
    except TierError:
        return
    assert found is None


def _open_files() -> int:
    return len(os.listdir(Path("/proc/self/fd")))


RULES: tuple[Callable[[Subject], None], ...] = (
    bytes_in_are_bytes_out,
    neighbours_are_not_touched,
    a_new_tier_finds_what_an_old_one_stored,
    what_was_never_stored_is_absent,
    contains_answers_in_order,
    deleted_is_gone,
    what_it_lists_is_what_it_has,
    the_same_again_is_fine,
    of_two_writers_of_a_key_one_is_whole,
    half_a_chunk_is_never_seen,
    a_flipped_byte_is_noticed,
    a_corrupt_chunk_can_be_replaced,
    a_deadline_that_has_passed_is_an_error,
    a_silent_backend_costs_the_deadline_and_no_more,
    many_threads_at_once,
    stats_say_how_it_is,
    closing_ends_threads_and_files,
    after_close_it_refuses,
)


def name_of(rule: Callable[[Subject], None]) -> str:
    return rule.__name__

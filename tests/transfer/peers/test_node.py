"""Daemons among each other, over the in-memory transport: fetching, pushing, joining and leaving, and what goes wrong."""

import asyncio
import contextlib

import msgspec
import pytest

from pdserve.transfer.peers import messages
from pdserve.transfer.peers.messages import DISK, MEMORY


def between(*names, **options):
    """The test is told with these hosts, which see each other; afterwards nothing may be held."""

    def decorate(tell):
        def test(helpers, network, tmp_path, monkeypatch):
            async def whole():
                for way in more.pop("ways", ()):
                    getattr(helpers, way)(monkeypatch)
                async with hosts(helpers, network, *names, **more) as made:
                    await tell(helpers, network, *made)

            more = options | ({"disk": tmp_path} if options.get("disk") else {})
            asyncio.run(asyncio.wait_for(whole(), 240))

        test.__doc__ = tell.__doc__
        return test

    return decorate


@contextlib.asynccontextmanager
async def hosts(helpers, network, *names, **options):
    made = [helpers.Host(network, name, **options) for name in names]
    for host in made:
        await host.start(*(name for name in names if name != host.name))
    for host in made:
        for name in names:
            if name != host.name:
                await helpers.until(lambda host=host, name=name: host.state(name) == "up", f"{host.name} sees {name}")
    try:
        yield made
    finally:
        await asyncio.gather(*(host.stop() for host in made))
        for host in made:
            host.nothing_is_held()


async def known(helpers, at, holder, count, place=MEMORY):
    book = at.node.directories[place]
    await helpers.until(lambda: book.size(f"fake://{holder.name}") == count, "the directory follows")


@between("a", "b")
async def test_a_missing_run_is_fetched_from_a_peer(helpers, network, a, b):
    for i in range(6):
        b.put(i)
    await known(helpers, a, b, 6)
    assert a.lookup(range(6)) == 6
    await helpers.until(lambda: all(a.has(i) for i in range(6)))
    assert all(a.right(i) for i in range(6))
    assert a.store.lookup([helpers.key(0)], 1, 0.0)[1][0].tier == "peer"
    a.store.client_gone(1)
    await helpers.until(lambda: not b.node.status()["peers"][0]["outgoing"])
    a.nothing_is_held()
    b.nothing_is_held()
    assert a.lookup(range(6)) == 0
    await known(helpers, b, a, 6)  # and tells that it has them now


@between("a", "b", "c")
async def test_a_run_is_fetched_from_several_peers_at_once(helpers, network, a, b, c):
    for i in range(10):
        b.put(i)
        c.put(i)
    await known(helpers, a, b, 10)
    await known(helpers, a, c, 10)
    assert a.lookup(range(10)) == 10
    await helpers.until(lambda: all(a.has(i) for i in range(10)))
    assert all(a.right(i) for i in range(10))
    assert a.counted("peer_chunks_total", "b", "in", "arrived") == 5
    assert a.counted("peer_chunks_total", "c", "in", "arrived") == 5


@between("a", "b")
async def test_only_what_follows_without_a_gap_is_fetched(helpers, network, a, b):
    for i in (0, 1, 3):
        b.put(i)
    a.put(10)
    a.tiering.below = [helpers.key(11)].__contains__  # a lower tier has it: not fetched, but no gap either
    await known(helpers, a, b, 3)
    assert a.lookup([2, 0, 1]) == 0  # the first is nowhere
    assert a.lookup([0, 10, 11, 1, 2, 3]) == 2
    await helpers.until(lambda: a.has(0) and a.has(1))
    assert not a.has(3)


@between("a", "b")
async def test_computing_is_preferred_when_it_is_faster(helpers, network, a, b):
    b.put(0)
    await known(helpers, a, b, 1)
    assert a.lookup([0], prefill_speed=1e9) == 0
    assert a.counted("peer_pull_decisions_total", "too_slow") == 1
    assert not a.has(0)


@between("a", "b", "c")
async def test_pushed_as_it_commits(helpers, network, a, b, c):
    """What is there goes at once, the rest with its commit, and only to whom it was promised."""
    a.put(0)
    assert a.node.giving.push("b", [helpers.key(i) for i in range(4)], asyncio.get_running_loop().time()) == 4
    await helpers.until(lambda: b.has(0))
    for i in (1, 2):
        a.put(i)
        await helpers.until(lambda i=i: b.has(i))
    assert all(b.right(i) for i in range(3))
    assert not any(c.has(i) for i in range(3))
    assert a.node.status()["wanted"] == 1
    assert a.node.giving.push("nobody", [helpers.key(0)], 0.0) == 0
    assert a.node.giving.push("a", [helpers.key(0)], 0.0) == 0  # it is here


@between("a", "b", pages=200)
async def test_more_than_may_be_held_is_sent_bit_by_bit(helpers, network, a, b):
    for i in range(20):  # an eighth of 200 pages is 4 chunks
        a.put(i)
    assert a.node.giving.push("b", [helpers.key(i) for i in range(20)], 0.0) == 20
    assert a.node.status()["peers"][0]["outgoing"] <= 5
    await helpers.until(lambda: all(b.has(i) for i in range(20)))
    assert all(b.right(i) for i in range(20))


@between("a", "b")
async def test_what_is_there_already_is_not_sent_again(helpers, network, a, b):
    a.put(0)
    b.put(0)
    a.node.giving.push("b", [helpers.key(0)], 0.0)
    await helpers.until(lambda: a.counted("peer_chunks_total", "b", "out", "refused") == 1)
    assert a.counted("peer_bytes_total", "b", "out") == 0


@between("a", "b")
async def test_an_engine_may_not_join_a_chunk_on_its_way_in(helpers, network, a, b):
    network.faults("a", "b").stalled = True
    a.put(0)
    a.node.giving.push("b", [helpers.key(0)], 0.0)
    await helpers.until(lambda: len(b.node.inbox) == 1)
    with pytest.raises(AssertionError):  # BUSY
        b.put(0)
    assert not b.has(0)
    assert b.lookup([0]) == 1  # worth waiting for
    network.faults("a", "b").stalled = False
    await helpers.until(lambda: b.has(0))
    assert b.right(0)


@between("a", "b")
async def test_wrong_bytes_are_dropped(helpers, network, a, b):
    network.faults("a", "b").corrupt_next = 1
    a.put(0)
    a.put(1)
    a.node.giving.push("b", [helpers.key(0)], 0.0)
    await helpers.until(lambda: a.counted("peer_chunks_total", "b", "out", "corrupt") == 1)
    assert not b.has(0)
    assert b.counted("cache_digest_failures_total", "peer") == 1
    a.node.giving.push("b", [helpers.key(0)], 0.0)
    await helpers.until(lambda: b.has(0))
    assert b.right(0)


@between("a", "b", ways=["give_up_soon"])
async def test_the_network_is_cut_while_chunks_move(helpers, network, a, b):
    for i in range(8):
        b.put(i)
    await known(helpers, a, b, 8)
    network.faults("b", "a").stalled = True
    assert a.lookup(range(8)) == 8
    await helpers.until(lambda: len(a.node.inbox) > 0)
    network.cut("a", "b")
    await helpers.until(lambda: len(a.node.inbox) == 0 and not a.node.status()["pulling"])
    network.faults("b", "a").stalled = False
    a.nothing_is_held()
    await helpers.until(lambda: a.state("b") == "up" and b.state("a") == "up", "they find each other again")
    await known(helpers, a, b, 8)
    await helpers.until(lambda: a.lookup(range(8)) > 0 or all(a.has(i) for i in range(8)))
    await helpers.until(lambda: all(a.has(i) for i in range(8)))
    assert all(a.right(i) for i in range(8))


@between("a", "b", ways=["hurry", "give_up_soon"])
async def test_a_peer_that_never_answers_costs_one_deadline(helpers, network, a, b):
    b.put(0)
    await known(helpers, a, b, 1)
    network.faults("a", "b").silent = True
    network.faults("b", "a").silent = True
    await helpers.until(lambda: a.state("b") == "down")
    failures = a.counted("peer_failures_total", "b")
    for _ in range(50):
        assert a.lookup([0]) == 0  # nobody waits for it
        assert a.node.giving.push("b", [helpers.key(5)], 0.0) == 1
    assert a.counted("peer_failures_total", "b") <= failures + 1
    assert not a.has(0)
    network.faults("a", "b").silent = False
    network.faults("b", "a").silent = False
    await helpers.until(lambda: a.state("b") == "up", "it is tried again by itself")


@between("a", "b", ways=["hurry", "give_up_soon"])
async def test_a_peer_that_stops_reading(helpers, network, a, b):
    """What waits for it is let go after the deadline; nothing stays held."""
    network.faults("a", "b").stalled = True
    for i in range(5):
        a.put(i)
    a.node.giving.push("b", [helpers.key(i) for i in range(5)], 0.0)
    await helpers.until(lambda: a.node.status()["peers"][0]["outgoing"] == 0)
    await helpers.until(lambda: len(b.node.inbox) == 0)
    a.nothing_is_held()
    b.nothing_is_held()
    assert a.store.drop([helpers.key(i) for i in range(5)], "dropped") == 5
    assert a.store.stats()["used_bytes"] == 0


@between("a", "b")
async def test_a_restarted_host_brings_nothing_of_its_former_life(helpers, network, a, b):
    for i in range(4):
        b.put(i)
    await known(helpers, a, b, 4)
    await b.stop()
    await helpers.until(lambda: a.state("b") != "up")
    assert a.lookup(range(4)) == 0
    again = helpers.Host(network, "b", epoch="2")
    again.put(7)
    await again.start("a")
    try:
        await helpers.until(lambda: a.state("b") == "up")
        await known(helpers, a, again, 1)
        assert a.lookup(range(4)) == 0
        assert a.lookup([7]) == 1
        await helpers.until(lambda: a.has(7))
    finally:
        b.node, b.ticking, b.store = again.node, again.ticking, again.store


@between("a", "b")
async def test_join_drain_and_leave_while_running(helpers, network, a, b):
    c = await helpers.Host(network, "c").start("a", "b")
    try:
        a.listed["fake://c"] = "c"
        await helpers.until(lambda: a.state("c") == "up")
        c.put(1)
        await known(helpers, a, c, 1)
        c.node.drain(True)
        await helpers.until(lambda: a.state("c") == "draining")
        a.put(2)
        assert a.node.giving.push("c", [helpers.key(2)], 0.0) == 0  # takes nothing new
        assert a.lookup([1]) == 1  # but gives
        await helpers.until(lambda: a.has(1))
        del a.listed["fake://c"]
        await helpers.until(lambda: a.state("c") is None)
        assert a.node.directories[0].size("fake://c") == 0
        assert a.state("b") == "up"
    finally:
        await c.stop()


@between("a", "b")
async def test_a_goodbye_is_believed_at_once(helpers, network, a, b):
    b.put(0)
    await known(helpers, a, b, 1)
    await b.node.stop()
    await helpers.until(lambda: a.state("b") in ("gone", "down") and a.node.directories[MEMORY].size("fake://b") == 0)


@between("a", "b")
async def test_its_own_address_in_the_list_is_left_out(helpers, network, a, b):
    network._listeners["alias"] = network._listeners["a"]
    a.listed["fake://alias"] = ""

    def errors():
        return {peer["url"]: peer["error"] for peer in a.node.status()["peers"]}

    await helpers.until(lambda: "this daemon itself" in errors().get("fake://alias", ""), "it finds out")
    assert a.state("b") == "up"


def test_chunks_of_another_size_are_refused_in_words(helpers, network):
    async def story():
        a, b = helpers.Host(network, "a"), helpers.Host(network, "b")
        b.node.chunk_tokens = 128
        await a.start("b")
        await b.start("a")
        try:
            await helpers.until(lambda: a.state("b") == "down")
            error = a.node.status()["peers"][0]["error"]
            assert "its chunks are of 128 tokens, ours of 256" in error
        finally:
            await a.stop()
            await b.stop()

    asyncio.run(asyncio.wait_for(story(), 60))


def test_another_version_is_refused_in_words_in_status_and_log(helpers, network, caplog):
    async def story():
        a, b = helpers.Host(network, "a"), helpers.Host(network, "b")
        answer = b.node.call

        async def newer(connection, payload):  # as if a had come from an older pdserve
            request = messages.decode_request(payload)
            if isinstance(request, messages.Greet):
                payload = messages.encode(msgspec.structs.replace(request, version=messages.VERSION - 1))
            return await answer(connection, payload)

        b.node.call = newer
        await a.start("b")
        await b.start("a")
        words = f"this daemon speaks version {messages.VERSION} with its peers, the other {messages.VERSION - 1}"
        try:
            await helpers.until(lambda: any(words in peer["error"] for peer in a.node.status()["peers"]))
            await helpers.until(lambda: a.counted("peer_failures_total", "b") >= 3, "it is tried again")
        finally:
            await a.stop()
            await b.stop()
        assert sum(words in record.getMessage() for record in caplog.records) == 1  # told once, not each time

    asyncio.run(asyncio.wait_for(story(), 60))


@between("a", "b", pages=96)
async def test_no_more_than_a_share_of_memory_is_taken_by_what_comes_in(helpers, network, a, b):
    network.faults("b", "a").stalled = True
    for i in range(12):
        b.put(i)
    await known(helpers, a, b, 12)
    assert 1 <= a.lookup(range(12)) <= 4  # a chunk is 6 pages; a quarter of 96 is 4 chunks
    await helpers.until(lambda: len(a.node.inbox) > 0)
    assert a.node.inbox.nbytes <= a.arena.size // 4
    network.faults("b", "a").stalled = False
    await helpers.until(lambda: a.lookup(range(12)) == 0 and all(a.has(i) for i in range(12)), "the rest follows")


@between("a", "b", "c")
async def test_states_of_other_hosts(helpers, network, a, b, c):
    b.node.state = lambda: b'{"name": "x"}'
    assert await a.node.states() == {"b": b'{"name": "x"}', "c": b""}


# ---- what a peer has on its disk only ----


async def on_disk_only(helpers, host, numbers):
    """Stored, written down, and evicted from memory."""
    written = host.metrics["cache_tier_chunks_total"].labels("disk", "down")._value
    for i in numbers:  # one after the other: what does not fit into the queue of writes would be left out
        before = written.get()
        host.put(i)
        await helpers.until(lambda before=before: written.get() > before, "it is written down")
    host.store.drop([helpers.key(i) for i in numbers], "dropped")


@between("a", "b", disk=True)
async def test_what_a_peer_has_on_disk_is_brought_up_there_and_comes_over(helpers, network, a, b):
    await on_disk_only(helpers, b, range(6))
    b.put(10)  # and one in memory in the middle of it
    await known(helpers, a, b, 1)
    await known(helpers, a, b, 7, DISK)
    order = [0, 1, 10, 2, 3, 4, 5]
    assert a.lookup(order) == 7
    await helpers.until(lambda: all(a.has(i) for i in order))
    assert all(a.right(i) for i in order)
    assert b.has(0)  # it is in memory there, too, for the next who asks
    await helpers.until(lambda: not b.node.giving.rising)
    assert b.counted("cache_tier_chunks_total", "disk", "up") == 6


@between("a", "b", disk=True, pages=200)
async def test_more_than_memory_holds_comes_from_a_disk_bit_by_bit(helpers, network, a, b):
    """30 chunks of 6 pages; an eighth of 200 pages may be held for others, a quarter may be on its way in."""
    await on_disk_only(helpers, b, range(30))
    await known(helpers, a, b, 30, DISK)
    seen, most = set(), 0

    def all_seen():  # as an engine would: asked again and again, what is here is used
        nonlocal most
        a.lookup([i for i in range(30) if i not in seen])
        seen.update(i for i in range(30) if a.has(i) and a.right(i))
        most = max(most, sum(c.size for c in b.store.chunks() if c.leases))
        return len(seen) == 30

    await helpers.until(all_seen, patience=40)
    assert most <= b.arena.size // 8 + 6 * 4096


@between("a", "b", disk=True)
async def test_a_promise_from_disk_that_cannot_be_kept_is_taken_back(helpers, network, a, b):
    await on_disk_only(helpers, b, [0, 1])
    await known(helpers, a, b, 2, DISK)
    for segment in b.disk.path.glob("*.seg"):  # every byte after the headers is wrong
        data = bytearray(segment.read_bytes())
        data[8192:] = bytes(x ^ 0x55 for x in data[8192:])
        segment.write_bytes(data)
    assert a.lookup([0, 1]) == 2
    await helpers.until(lambda: not a.node.status()["pulling"], "nobody waits for them any more")
    assert a.counted("peer_pull_decisions_total", "missing") == 2
    assert not a.has(0)
    assert b.counted("cache_digest_failures_total", "disk") == 2
    await known(helpers, a, b, 0, DISK)  # and it is said that they are gone


@between("a", "b", disk=True)
async def test_the_slower_of_disk_and_link_decides(helpers, network, a, b):
    """In memory before it lies a chunk that is worth it by itself; what lies on a slow disk behind it is not."""
    await on_disk_only(helpers, b, [1, 2])
    b.put(0)
    await known(helpers, a, b, 3, DISK)
    b.tiering.disk_speed = lambda: 50_000.0  # half a second for each chunk
    member = a.node.member("fake://b")
    await helpers.until(lambda: member.disk_told == 50_000)
    assert a.lookup([1, 2], prefill_speed=1000.0) == 0
    assert a.counted("peer_pull_decisions_total", "too_slow") == 1
    assert a.lookup([0, 1, 2], prefill_speed=1000.0) == 1
    await helpers.until(lambda: a.has(0))
    a.node.fetching.tick(float("inf"))  # some time later
    assert a.lookup([1, 2], prefill_speed=1.0) == 2  # computing is slower still
    await helpers.until(lambda: a.has(1) and a.has(2))
    assert member.speed(DISK) > 50_000  # it was found out that the disk is faster than it said


@between("a", "b", disk=True, ways=["give_up_soon"])
async def test_who_waits_for_a_disk_waits_no_longer_than_agreed(helpers, network, a, b):
    await on_disk_only(helpers, b, [0])
    await known(helpers, a, b, 1, DISK)
    asked = []
    b.tiering.bring_up = lambda key, now: bool(asked.append(key))  # too much is on its way up already
    assert a.lookup([0]) == 1
    await helpers.until(lambda: asked)  # `rising` is 1 only until the deadline
    await helpers.until(lambda: a.lookup([0]) == 0, "its deadline has passed")
    await helpers.until(lambda: not a.node.fetching, "the next tick forgets it")
    await helpers.until(lambda: b.node.giving.rising == 0, "and the other end has forgotten it")
    assert not a.has(0)


@between("a", "b", disk=True, ways=["give_up_soon"])
async def test_one_that_cannot_come_up_now_holds_nobody_up(helpers, network, a, b):
    await on_disk_only(helpers, b, range(12))
    await known(helpers, a, b, 12, DISK)
    bring_up = b.tiering.bring_up
    b.tiering.bring_up = lambda key, now: key != helpers.key(0) and bring_up(key, now)  # an engine is writing it, say
    assert a.lookup(range(12)) == 12
    await helpers.until(lambda: a.lookup(range(12)) >= 0 and all(a.has(i) for i in range(1, 12)))
    await helpers.until(lambda: not b.node.giving.rising, "the first is forgotten in time")
    assert not a.has(0)


@between("a", "b", disk=True)
async def test_what_is_deleted_from_a_disk_is_known_to_be_gone(helpers, network, a, b):
    await on_disk_only(helpers, b, range(4))
    await known(helpers, a, b, 4, DISK)
    b.tiering.delete([helpers.key(0)])
    await known(helpers, a, b, 3, DISK)
    assert a.lookup([0]) == 0
    b.tiering.clear()
    await known(helpers, a, b, 0, DISK)


def test_a_restarted_host_tells_what_its_disk_has_kept(helpers, network, tmp_path):
    async def story():
        b = helpers.Host(network, "b", disk=tmp_path)
        await b.start()
        await on_disk_only(helpers, b, range(3))
        await b.stop()
        async with hosts(helpers, network, "a", "b", disk=tmp_path) as (a, again):
            await known(helpers, a, again, 3, DISK)
            assert a.lookup(range(3)) == 3
            await helpers.until(lambda: all(a.has(i) for i in range(3)))
            assert all(a.right(i) for i in range(3))

    asyncio.run(asyncio.wait_for(story(), 60))

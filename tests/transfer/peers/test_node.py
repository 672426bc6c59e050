"""Daemons among each other, over the in-memory transport: fetching, pushing, joining and leaving, and what goes wrong."""

import asyncio
import contextlib

import pytest


@pytest.fixture
def run():
    return lambda coroutine: asyncio.run(asyncio.wait_for(coroutine, 60))


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


async def known(helpers, at, holder, count):
    await helpers.until(lambda: at.node.directory.size(f"fake://{holder.name}") == count, "the directory follows")


def test_a_missing_run_is_fetched_from_a_peer(run, helpers, network):
    async def story():
        async with hosts(helpers, network, "a", "b") as (a, b):
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

    run(story())


def test_a_run_is_fetched_from_several_peers_at_once(run, helpers, network):
    async def story():
        async with hosts(helpers, network, "a", "b", "c") as (a, b, c):
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

    run(story())


def test_only_what_follows_without_a_gap_is_fetched(run, helpers, network):
    async def story():
        async with hosts(helpers, network, "a", "b") as (a, b):
            for i in (0, 1, 3):
                b.put(i)
            a.put(10)
            a.below.add(helpers.key(11))  # a lower tier has it: not fetched, but no gap either
            await known(helpers, a, b, 3)
            assert a.lookup([2, 0, 1]) == 0  # the first is nowhere
            assert a.lookup([0, 10, 11, 1, 2, 3]) == 2
            await helpers.until(lambda: a.has(0) and a.has(1))
            assert not a.has(3)

    run(story())


def test_computing_is_preferred_when_it_is_faster(run, helpers, network):
    async def story():
        async with hosts(helpers, network, "a", "b") as (a, b):
            b.put(0)
            await known(helpers, a, b, 1)
            assert a.lookup([0], prefill_speed=1e9) == 0
            assert a.counted("peer_pull_decisions_total", "too_slow") == 1
            assert not a.has(0)

    run(story())


def test_pushed_as_it_commits(run, helpers, network):
    """What is there goes at once, the rest with its commit, and only to whom it was promised."""

    async def story():
        async with hosts(helpers, network, "a", "b", "c") as (a, b, c):
            a.put(0)
            assert a.node.push("b", [helpers.key(i) for i in range(4)], asyncio.get_running_loop().time()) == 4
            await helpers.until(lambda: b.has(0))
            for i in (1, 2):
                a.put(i)
                await helpers.until(lambda i=i: b.has(i))
            assert all(b.right(i) for i in range(3))
            assert not any(c.has(i) for i in range(3))
            assert a.node.status()["wanted"] == 1
            assert a.node.push("nobody", [helpers.key(0)], 0.0) == 0
            assert a.node.push("a", [helpers.key(0)], 0.0) == 0  # it is here

    run(story())


def test_more_than_may_be_held_is_sent_bit_by_bit(run, helpers, network):
    async def story():
        async with hosts(helpers, network, "a", "b", pages=200) as (a, b):  # an eighth of 200 pages is 4 chunks
            for i in range(20):
                a.put(i)
            assert a.node.push("b", [helpers.key(i) for i in range(20)], 0.0) == 20
            assert a.node.status()["peers"][0]["outgoing"] <= 5
            await helpers.until(lambda: all(b.has(i) for i in range(20)))
            assert all(b.right(i) for i in range(20))

    run(story())


def test_what_is_there_already_is_not_sent_again(run, helpers, network):
    async def story():
        async with hosts(helpers, network, "a", "b") as (a, b):
            a.put(0)
            b.put(0)
            a.node.push("b", [helpers.key(0)], 0.0)
            await helpers.until(lambda: a.counted("peer_chunks_total", "b", "out", "refused") == 1)
            assert a.counted("peer_bytes_total", "b", "out") == 0

    run(story())


def test_an_engine_may_not_join_a_chunk_on_its_way_in(run, helpers, network):
    async def story():
        async with hosts(helpers, network, "a", "b") as (a, b):
            network.faults("a", "b").stalled = True
            a.put(0)
            a.node.push("b", [helpers.key(0)], 0.0)
            await helpers.until(lambda: len(b.node.inbox) == 1)
            with pytest.raises(AssertionError):  # BUSY
                b.put(0)
            assert not b.has(0)
            assert b.lookup([0]) == 1  # worth waiting for
            network.faults("a", "b").stalled = False
            await helpers.until(lambda: b.has(0))
            assert b.right(0)

    run(story())


def test_wrong_bytes_are_dropped(run, helpers, network):
    async def story():
        async with hosts(helpers, network, "a", "b") as (a, b):
            network.faults("a", "b").corrupt_next = 1
            a.put(0)
            a.put(1)
            a.node.push("b", [helpers.key(0)], 0.0)
            await helpers.until(lambda: a.counted("peer_chunks_total", "b", "out", "corrupt") == 1)
            assert not b.has(0)
            assert b.counted("cache_digest_failures_total", "peer") == 1
            a.node.push("b", [helpers.key(0)], 0.0)
            await helpers.until(lambda: b.has(0))
            assert b.right(0)

    run(story())


def test_the_network_is_cut_while_chunks_move(run, helpers, network):
    async def story():
        async with hosts(helpers, network, "a", "b") as (a, b):
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

    run(story())


def test_a_peer_that_never_answers_costs_one_deadline(run, helpers, network):
    async def story():
        async with hosts(helpers, network, "a", "b") as (a, b):
            b.put(0)
            await known(helpers, a, b, 1)
            network.faults("a", "b").silent = True
            network.faults("b", "a").silent = True
            await helpers.until(lambda: a.state("b") == "down")
            failures = a.counted("peer_failures_total", "b")
            for _ in range(50):
                assert a.lookup([0]) == 0  # nobody waits for it
                assert a.node.push("b", [helpers.key(5)], 0.0) == 1
            assert a.counted("peer_failures_total", "b") <= failures + 1
            assert not a.has(0)
            network.faults("a", "b").silent = False
            network.faults("b", "a").silent = False
            await helpers.until(lambda: a.state("b") == "up", "it is tried again by itself")

    run(story())


def test_a_peer_that_stops_reading(run, helpers, network):
    """What waits for it is let go after the deadline; nothing stays held."""

    async def story():
        async with hosts(helpers, network, "a", "b") as (a, b):
            network.faults("a", "b").stalled = True
            for i in range(5):
                a.put(i)
            a.node.push("b", [helpers.key(i) for i in range(5)], 0.0)
            await helpers.until(lambda: a.node.status()["peers"][0]["outgoing"] == 0)
            await helpers.until(lambda: len(b.node.inbox) == 0)
            a.nothing_is_held()
            b.nothing_is_held()
            assert a.store.drop([helpers.key(i) for i in range(5)], "dropped") == 5
            assert a.store.stats()["used_bytes"] == 0

    run(story())


def test_a_restarted_host_brings_nothing_of_its_former_life(run, helpers, network):
    async def story():
        async with hosts(helpers, network, "a", "b") as (a, b):
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

    run(story())


def test_join_drain_and_leave_while_running(run, helpers, network):
    async def story():
        async with hosts(helpers, network, "a", "b") as (a, _):
            c = await helpers.Host(network, "c").start("a", "b")
            try:
                a.listed["fake://c"] = "c"
                await helpers.until(lambda: a.state("c") == "up")
                c.put(1)
                await known(helpers, a, c, 1)
                c.node.drain(True)
                await helpers.until(lambda: a.state("c") == "draining")
                a.put(2)
                assert a.node.push("c", [helpers.key(2)], 0.0) == 0  # takes nothing new
                assert a.lookup([1]) == 1  # but gives
                await helpers.until(lambda: a.has(1))
                del a.listed["fake://c"]
                await helpers.until(lambda: a.state("c") is None)
                assert a.node.directory.size("fake://c") == 0
                assert a.state("b") == "up"
            finally:
                await c.stop()

    run(story())


def test_a_goodbye_is_believed_at_once(run, helpers, network):
    async def story():
        async with hosts(helpers, network, "a", "b") as (a, b):
            b.put(0)
            await known(helpers, a, b, 1)
            await b.node.stop()
            assert a.node.directory.size("fake://b") == 0
            assert a.state("b") in ("gone", "down")

    run(story())


def test_its_own_address_in_the_list_is_left_out(run, helpers, network):
    async def story():
        async with hosts(helpers, network, "a", "b") as (a, _):
            network._listeners["alias"] = network._listeners["a"]
            a.listed["fake://alias"] = ""
            await helpers.until(lambda: a.node._members.get("fake://alias") is not None)
            await asyncio.sleep(0.3)
            errors = {peer["url"]: peer["error"] for peer in a.node.status()["peers"]}
            assert "this daemon itself" in errors["fake://alias"]
            assert a.state("b") == "up"

    run(story())


def test_chunks_of_another_size_are_refused_in_words(run, helpers, network):
    async def story():
        a, b = helpers.Host(network, "a"), helpers.Host(network, "b")
        b.node._chunk_tokens = 128
        await a.start("b")
        await b.start("a")
        try:
            await helpers.until(lambda: a.state("b") == "down")
            error = a.node.status()["peers"][0]["error"]
            assert "its chunks are of 128 tokens, ours of 256" in error
        finally:
            await a.stop()
            await b.stop()

    run(story())


def test_no_more_than_a_share_of_memory_is_taken_by_what_comes_in(run, helpers, network):
    async def story():
        async with hosts(helpers, network, "a", "b", pages=96) as (
            a,
            b,
        ):  # a chunk is 6 pages; a quarter of 96 is 4 chunks
            network.faults("b", "a").stalled = True
            for i in range(12):
                b.put(i)
            await known(helpers, a, b, 12)
            assert 1 <= a.lookup(range(12)) <= 4
            await helpers.until(lambda: len(a.node.inbox) > 0)
            assert a.node.inbox.nbytes <= a.arena.size // 4
            network.faults("b", "a").stalled = False
            await helpers.until(
                lambda: a.lookup(range(12)) == 0 and all(a.has(i) for i in range(12)), "the rest follows"
            )

    run(story())


def test_states_of_other_hosts(run, helpers, network, tmp_path):
    async def story():
        async with hosts(helpers, network, "a", "b", "c") as (a, b, _):
            b.node._state_file = tmp_path / "state.json"
            b.node._state_file.write_bytes(b'{"name": "x"}')
            assert await a.node.states() == {"b": b'{"name": "x"}', "c": b""}

    run(story())

"""Cache daemons of two and three hosts over real TCP: fetching and pushing, then everything that a network does to it.

Chunks are synthetic; every lookup compares the bytes that it finds. After each test nothing may be held anywhere.
"""

import shutil
import signal
import time
import urllib.request
from pathlib import Path

import netns
import pytest
from host_relay import Relay
from hosts_daemons import ADMIN_PORT, CHUNK, PEER_PORT, Daemon, key, until

pytestmark = [
    pytest.mark.skipif(bool(netns.missing()), reason=netns.missing() or "-"),
]
needs_iptables = pytest.mark.skipif(shutil.which("iptables") is None, reason="iptables is not installed")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("h")
    net = netns.Net("a", "b", "c")
    daemons = []
    try:
        daemons = [Daemon(net, name, folder) for name in "abc"]
        for daemon in daemons:
            daemon.ready()
        yield daemons
    finally:
        try:
            for daemon in daemons:
                daemon.stop()
        finally:
            net.close()


@pytest.fixture
def trio(hosts):
    """All well and empty before, all released afterwards."""
    for daemon in hosts:
        daemon.host.mend()
        if daemon.process.poll() is not None:  # a test that failed has left it dead
            daemon.again()
    for daemon in hosts:
        daemon.sees(*(d.name for d in hosts if d is not daemon))
        daemon.ask("/cache", "DELETE")
    for daemon in hosts:
        for other in hosts:
            if other is not daemon:
                daemon.knows(other.name, 0)
    time.sleep(0.2)
    before = [daemon.fds() for daemon in hosts]
    yield hosts
    for daemon in hosts:
        daemon.host.mend()
    for daemon, fds in zip(hosts, before, strict=True):
        daemon.sees(*(d.name for d in hosts if d is not daemon))
        daemon.released(fds + 8)  # streams of TCP come and go


def test_what_another_host_has_is_fetched(trio):
    a, b, _ = trio
    b.put(range(12))
    a.knows("b", 12)
    until(lambda: a.find(range(12)) == (0, 12) or a.find(range(12))[0], "all of it is fetched at once")
    a.gets(range(12))
    b.knows("a", 12)


def test_a_run_is_fetched_from_two_hosts_at_once(trio):
    a, b, c = trio
    for daemon in (b, c):
        daemon.host.limit("400mbit")

    def both_gave(numbers):
        for daemon in (b, c):
            known = a.peer(daemon.name)["chunks"]
            daemon.put(numbers)
            a.knows(daemon.name, known + len(numbers))
        before = [_out(daemon, "a") for daemon in (b, c)]
        a.gets(numbers)
        return all(_out(daemon, "a") > count for daemon, count in zip((b, c), before, strict=True))

    # How fast each is gets known by and by; one that was once very slow is not asked at first.
    fresh = iter(range(0, 160, 16))
    until(lambda: both_gave(range(start := next(fresh), start + 16)), "each of the two gave a part")


def _out(daemon, peer):
    with daemon.host.inside():
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        text = opener.open(f"http://127.0.0.1:{ADMIN_PORT}/metrics", timeout=10).read().decode()
    wanted = f'pdserve_peer_chunks_total{{direction="out",peer="{peer}",result="arrived"}}'
    return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(wanted)), 0.0)


def test_pushed_as_it_is_committed(trio):
    a, b, _ = trio
    assert a.client.push("b", [key(i) for i in range(8)], 5.0) == 8
    for i in range(8):
        a.put([i])
        until(lambda i=i: b.has_all([i]), f"chunk {i} is there before the next is computed")
    assert a.client.push(b.host.address, [key(0)], 5.0) == 1  # by address too


@needs_iptables
def test_the_link_is_cut_in_the_middle(trio):
    a, b, c = trio
    b.put(range(20))
    a.knows("b", 20)
    b.host.limit("20mbit")  # 20 MiB take eight seconds
    a.promised(range(20))
    b.host.cut()
    assert a.fetch(range(20)) < 20  # ends, with what had come
    until(lambda: a.peer("b")["state"] == "down", "b is left alone")
    until(lambda: a.find(range(20))[1] == 0, "nobody waits for it")
    c.put([100])
    a.knows("c", 1)
    a.gets([100])  # the others are not in the way
    b.host.mend()
    a.sees("b")
    a.knows("b", 20)
    a.gets(range(20))  # after the repair the rest is fetched


def test_a_host_dies_in_the_middle_and_comes_back_empty(trio):
    a, b, _ = trio
    b.put(range(20))
    a.knows("b", 20)
    b.host.limit("20mbit")
    a.promised(range(20))
    b.host.kill()
    assert a.fetch(range(20)) < 20
    a.released()
    b.process.wait(10)
    b.host.mend()
    b.socket.unlink(missing_ok=True)
    for path in Path("/dev/shm").glob(f"pdserve-{b.label}.*"):  # power was lost, memory with it
        path.unlink()
    b.again()
    a.sees("b")
    a.knows("b", 0)  # what it had in its former life is forgotten
    assert a.find(range(20))[1] == 0


@needs_iptables
def test_one_packet_in_a_hundred_is_lost(trio):
    a, b, _ = trio
    for host in (a.host, b.host):
        host.lose(0.01)
    b.put(range(30))
    a.knows("b", 30)
    a.gets(range(30))
    a.client.push("b", [key(i) for i in range(40, 50)], 5.0)
    a.put(range(40, 50))
    until(lambda: b.has_all(range(40, 50)), "and what is pushed as well")


def test_a_slow_link_is_found_out(trio):
    """At 8 Mbit/s a MiB takes a second: what was asked for comes late or not at all, then computing is preferred."""
    a, b, _ = trio
    b.host.limit("8mbit")
    b.put(range(6))
    a.knows("b", 6)
    a.fetch(range(6))  # ends, whatever has come
    until(lambda: a.fetch(range(6)) == 6 or a.peer("b")["bytes_per_s"] < 20e6, "it is known how slow it is")
    a.host.limit("8mbit")
    a.client.push("b", [key(i) for i in range(10, 13)], 5.0)
    a.put(range(10, 13))
    until(lambda: b.has_all([10]), "what is pushed arrives, slowly")


def test_a_peer_that_stops_reading(trio):
    """Stopped, it accepts and never answers: that costs one deadline, not one for each request."""
    a, b, _ = trio
    b.put(range(4))
    a.knows("b", 4)
    a.put(range(20, 40))
    b.signal(signal.SIGSTOP)
    try:
        a.client.push("b", [key(i) for i in range(20, 40)], 5.0)
        assert a.fetch(range(4)) == 0
        until(lambda: a.peer("b")["state"] == "down", "b is left alone")
        for _ in range(20):
            assert a.find(range(4)) == (0, 0)
        a.released()
    finally:
        b.signal(signal.SIGCONT)
    a.sees("b")
    a.gets(range(4))  # and all is well again


def test_fifty_milliseconds_away(tmp_path):
    """Over relays that hold everything back by 25 ms each way; each host knows the other only by its relay."""
    net = netns.Net("a", "b")
    relays, daemons = [], []
    try:
        for near, far in (("a", "b"), ("b", "a")):
            relays.append(Relay(net[near], PEER_PORT + 10, (net[far].address, PEER_PORT), 0.025))
        daemons = [
            Daemon(net, "a", tmp_path, [f"b={relays[0].url}"]),
            Daemon(net, "b", tmp_path, [f"a={relays[1].url}"]),
        ]
        a, b = daemons
        for daemon in daemons:
            daemon.ready()
        a.sees("b")
        b.sees("a")
        b.put(range(10))
        a.knows("b", 10)
        a.gets(range(10))
        a.client.push("b", [key(i) for i in range(20, 30)], 5.0)
        a.put(range(20, 30))
        until(lambda: b.has_all(range(20, 30)), "and pushed")
        for daemon in daemons:
            daemon.released()
    finally:
        for daemon in daemons:
            daemon.stop()
        for relay in relays:
            relay.close()
        net.close()


def test_drain_and_states(trio):
    a, b, c = trio
    b.ask("/peers/drain?on=true", "POST")
    until(lambda: a.peer("b")["state"] == "draining", "a is told")
    a.put([1])
    assert a.client.push("b", [key(1)], 5.0) == 0
    b.ask("/peers/drain?on=false", "POST")
    until(lambda: a.peer("b")["state"] == "up", "and told of its end")
    assert c.ask("/peers/states") == {"a": None, "b": None}  # no launcher has written anything


def test_what_a_host_has_on_disk_is_found_after_its_restart(tmp_path):
    """Memory is lost with the restart; the disk is not, and the other host is told so."""
    net = netns.Net("a", "b")
    daemons = []
    try:
        folder = tmp_path / "disk"
        disk = ["--disk", str(folder), "--disk-size", "128MiB", "--disk-min-free", "0"]
        daemons = [Daemon(net, "a", tmp_path), Daemon(net, "b", tmp_path, options=disk)]
        a, b = daemons
        for daemon in daemons:
            daemon.ready()
        a.sees("b")
        b.put(range(12))
        until(lambda: b.status()["tiers"]["disk"]["chunks"] == 12, "all of it is written down")
        b.stop()
        (segment,) = folder.glob("*.seg")
        size, good = segment.stat().st_size, 6 * CHUNK + CHUNK // 2
        with segment.open("r+b") as file:  # its index says that all is there; half of it is zeros
            file.seek(good)
            file.write(bytes(size - good))
        b.again()
        a.sees("b")
        until(lambda: a.peer("b")["chunks"] == 0, "what was in b's memory is forgotten")
        until(lambda: a.peer("b")["disk_chunks"] > 0, "what is on its disk is known")
        until(lambda: a.fetch(range(12)) == 6, "what can be read comes; for the rest nobody waits")
        until(lambda: a.peer("b")["disk_chunks"] == 6, "and it is known to be gone")
        for daemon in daemons:
            daemon.released()
    finally:
        for daemon in daemons:
            daemon.stop()
        net.close()

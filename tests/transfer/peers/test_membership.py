"""Who takes part: joining, draining, leaving, a crash and a wedge, with time handed in."""

from pdserve.transfer.peers.membership import CAREFUL, FIRST_SPEED, Members
from pdserve.transfer.peers.messages import DISK, MEMORY

A, B = "tcp://10.0.0.1:7900", "tcp://10.0.0.2:7900"


def test_join_and_leave():
    members = Members(own=A)
    joined, left = members.listed({A: "a", B: "b"})
    assert [m.url for m in joined] == [B]  # not ourselves
    assert left == []
    assert members.get(A).state(0) == "self"
    assert members.listed({A: "a", B: "b"}) == ([], [])
    joined, left = members.listed({A: "a"})
    assert [m.name for m in left] == ["b"]
    assert members.find("b") is None


def test_found_by_name_url_or_address_but_never_ourselves():
    members = Members(own=A)
    members.listed({A: "a", B: "b"})
    assert members.find("b") is members.find(B) is members.find("10.0.0.2") is members.get(B)
    assert members.find("a") is None
    assert members.find("10.0.0.1") is None
    assert members.find("nobody") is None
    members.listed({"tcp://10.9.0.3:1": "c,10.0.0.3,third"})  # its engines are reached at another address
    assert members.find("10.0.0.3") is members.find("third") is members.find("c") is members.find("10.9.0.3")
    assert members.find("c").name == "c"


def test_an_address_of_our_own_is_found_out_by_its_greeting():
    members = Members(own="tcp://127.0.0.1:1", epoch="mine")
    members.listed({A: ""})  # the same daemon by another address, as DNS lists it
    assert not members.greeted(members.get(A), "x", "mine")
    assert members.others() == []


def test_life_of_a_peer():
    members = Members(own=A)
    members.listed({B: "b"})
    b = members.get(B)
    assert (b.state(0), b.gives(0), b.takes(0)) == ("joining", False, True)
    assert not b.greeting("b", "e1")
    assert (b.state(0), b.gives(0), b.takes(0)) == ("up", True, True)
    b.draining = True
    assert (b.state(0), b.gives(0), b.takes(0)) == ("draining", True, False)
    b.gone = True
    assert (b.state(0), b.gives(0), b.takes(0)) == ("gone", False, False)
    assert b.greeting("b", "e2")  # another start of it
    assert b.state(0) == "up"


def test_one_call_without_an_answer_and_it_is_left_alone():
    members = Members(own=A)
    members.listed({B: "b"})
    b = members.get(B)
    b.greeting("b", "e")
    b.failed(b.breaker.allow(10.0), 10.0, "no answer in time")
    assert (b.state(10.1), b.gives(10.1), b.takes(10.1)) == ("down", False, False)
    assert b.breaker.allow(10.1) is None
    assert b.last_error == "no answer in time"
    probe = b.breaker.allow(10.0 + CAREFUL.first_pause)
    assert probe is not None
    assert b.breaker.allow(10.0 + CAREFUL.first_pause) is None  # one probe at a time
    b.breaker.success(probe)
    assert b.state(11.0) == "up"


def test_speed_follows_what_is_seen():
    members = Members(own=A)
    members.listed({B: "b"})
    b = members.get(B)
    for _ in range(20):
        b.observed(5_000_000, 1.0)
    assert 4.9e6 < b.speed() < 5.2e6
    b.at_least(1_000_000, 1.0)  # a lower bound that is known already
    assert 4.9e6 < b.speed() < 5.2e6
    b.at_least(20_000_000, 1.0)
    assert b.speed() == 20e6
    for _ in range(20):
        b.observed(5_000_000, 1.0)
    b.too_slow()
    assert 2.4e6 < b.speed() < 2.7e6
    for _ in range(20):
        b.observed(5_000_000, 1.0)
    b.observed(0, 1.0)
    assert 4.9e6 < b.speed() < 5.2e6


def test_from_a_disk_nothing_comes_faster_than_over_the_link_and_what_is_seen_counts():
    members = Members(own=A)
    members.listed({B: "b"})
    b = members.get(B)
    assert b.speed(DISK) == b.speed(MEMORY) == FIRST_SPEED
    b.disk_told = 20e6
    assert b.speed(DISK) == 20e6
    b.disk_told = 10 * FIRST_SPEED
    assert b.speed(DISK) == FIRST_SPEED
    for _ in range(30):
        b.observed(5_000_000, 1.0, DISK)
    assert 4.9e6 < b.speed(DISK) < 5.1e6  # whatever it says
    assert b.speed(MEMORY) == FIRST_SPEED
    b.too_slow(DISK)
    assert b.speed(DISK) < 2.6e6
    b.second_chance(DISK)
    assert 2.5e6 < b.speed(DISK) < 2.8e6

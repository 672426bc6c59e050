"""Real engines on three hosts made of network namespaces: two producers, two consumers, a cache daemon on each host.

float32, so that tokens must be those of plain vLLM, which answered the same prompts before, alone. Prompts are never asked
twice unless reuse is what is tested. One deployment serves the whole file; the last tests take it apart.
"""

import importlib.util
import json
import os
import random
import secrets
import shutil
import signal
import threading
import time
from pathlib import Path

import hosts_launch
import netns
import pytest
from host_relay import Relay
from hosts_launch import Spread

pytestmark = [
    pytest.mark.skipif(bool(netns.missing()), reason=netns.missing() or "-"),
    pytest.mark.skipif(shutil.which("iptables") is None, reason="iptables is not installed (Debian: iptables)"),
    pytest.mark.timeout(900),  # the first test waits for all engines
]

ENGINE = """
engine:
  device: cpu
  dtype: float32
  max_model_len: 2048
  max_num_seqs: 4
  kv_cache_space_gib: 1
  enable_prefix_caching: {prefix}
"""

PLAIN = """
name: hosts{pid}
model: demo
hosts: [{{name: a, address: {a}}}]
{engine}
plain: [{{port: 22610, host: a}}]
"""

SPREAD = """
name: hosts{pid}
model: demo
hosts:
  - {{name: a, address: {a}}}
  - {{name: b, address: {b}}}
  - {{name: c, address: {c}}}
{engine}
prefill: [{{port: 22620, host: a, cpus: "0"}}, {{port: 22621, host: c, cpus: "0"}}]
decode: [{{port: 22630, host: b, cpus: "1"}}, {{port: 22631, host: c, cpus: "1"}}]
cache: {{size: 512MiB, load: always, patience: 4, admin_port: 22680}}
peers: {{port: 22690}}
proxy: {{port: 22600, host: b, prefill_timeout: 45}}
"""

#: tokens of each prompt; 300 is one full chunk and a tail, 40 a tail alone
LENGTHS = [300, 700, 40, 530, 600, 512, 450, 620, 580, 640, 560, 700, 660, 610, 540, 520, 480, 570, 590, 550]
#: what runs where
HOST = {"prefill-0": "a", "prefill-1": "c", "decode-0": "b", "decode-1": "c"}


def prompt(i: int) -> list[int]:
    rng = random.Random(1000 + i)
    return [rng.randrange(1000, 40000) for _ in range(LENGTHS[i])]


class World:
    def __init__(self, spread: Spread, reference: list[list[int]]) -> None:
        self.spread, self.reference, self.net = spread, reference, spread.net
        self.proxy = f"http://{spread.net['b'].address}:22600"
        self.salt = ""

    def engine(self, host: str, port: int) -> str:
        return f"http://{self.net[host].address}:{port}"

    def ask(self, i: int, url: str = "", host: str = "b", **more):
        answer = self.spread.complete(host, url or self.proxy, prompt(i), cache_salt=self.salt, **more)
        assert answer.status == 200, answer.body
        return answer

    def right(self, i: int, answer) -> None:
        assert answer.ids == self.reference[i], f"prompt {i}: {answer.ids} is not plain vLLM's {self.reference[i]}"

    def sent(self, host: str) -> int:
        """Chunks that the daemon of this host gave to others and they took."""
        text = self.metrics(host)
        lines = [x for x in text.splitlines() if x.startswith("pdserve_peer_chunks_total{") and 'direction="out"' in x]
        return int(sum(float(x.split()[-1]) for x in lines if 'result="arrived"' in x))

    def metrics(self, host: str) -> str:
        with self.net[host].inside(), hosts_launch.OPENER.open("http://127.0.0.1:22680/metrics", timeout=10) as answer:
            return answer.read().decode()

    def pair(self, answer) -> tuple[str, str]:
        return answer.headers["x-pdserve-prefill"], answer.headers["x-pdserve-decode"]

    def crosses(self, pairs: set[tuple[str, str]]) -> None:
        """More requests, until one has gone from one host to another."""
        rng = random.Random()
        for _ in range(8):
            if any(HOST[prefill] != HOST[decode] for prefill, decode in pairs):
                return
            own = [rng.randrange(1000, 40000) for _ in range(300)]
            pairs.add(self.pair(self.spread.complete("b", self.proxy, own)))
        raise AssertionError(f"every request stayed on its host: {pairs}")

    def peers(self, host: str) -> dict[str, dict]:
        return {p["name"]: p for p in self.spread.daemon(host)["peers"]["peers"]}

    def pid(self, host: str, process: str) -> int:
        (facts,) = self.spread.status(host)
        return next(p["pid"] for p in facts["processes"] if p["name"] == process)

    def waits_for(self, condition, what: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.2)

    def mended(self, *names: str) -> None:
        """All links are well, every host sees every other, and the proxy every engine."""
        for name in names:
            self.net[name].mend()
        for name in names:
            others = [other for other in names if other != name]
            self.waits_for(
                lambda n=name, o=others: all(self.peers(n)[x]["state"] == "up" for x in o), f"{name} sees all"
            )
        self.waits_for(self._engines_are_up, "the proxy sees all engines")

    def _engines_are_up(self) -> bool:
        return self.spread.ask("b", f"{self.proxy}/health").status == 200

    def released(self, *names: str) -> None:
        for name in names:
            self.waits_for(lambda n=name: not self._held(n), f"{name} holds nothing: {self._held(name)}")

    def _held(self, name: str) -> dict[str, int]:
        s = self.spread.daemon(name)
        p = s["peers"]
        held = {key: s[key] for key in ("leases", "reservations")} | {
            k: p[k] for k in ("incoming", "pulling", "rising")
        }
        held["outgoing"] = sum(x["outgoing"] for x in p["peers"])
        return {key: count for key, count in held.items() if count}


@pytest.fixture(scope="module")
def launched(stage, tmp_path_factory):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here")
    stage.close()  # memory for four engines
    folder = Path(f"/tmp/pdh{os.getpid()}")  # a unix socket's path must be short
    folder.mkdir()
    try:
        with hosts_launch.hosts("a", "b", "c") as net:
            where = {name: host.address for name, host in net.hosts.items()} | {"pid": os.getpid()}
            reference = _reference(net, folder, where)
            spread = Spread(net, SPREAD.format(**where, engine=ENGINE.format(prefix="true")), folder)
            try:
                spread.launch("a", "b", "c")
                spread.wait_ready("a", "b", "c")
                yield World(spread, reference)
            finally:
                spread.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def spread(launched):
    """Nothing that another test asked, or this one in its first try, is in any cache: prompts have references, and are few."""
    launched.salt = secrets.token_hex(8)
    return launched


def _reference(net, folder, where):
    """What plain vLLM answers to each prompt."""
    plain = Spread(net, PLAIN.format(**where, engine=ENGINE.format(prefix="false")), folder)
    try:
        plain.launch("a")
        plain.wait_ready("a")
        url = f"http://{net['a'].address}:22610"
        return [plain.complete("a", url, prompt(i)).ids for i in range(len(LENGTHS))]
    finally:
        plain.stop()


def test_one_status_for_all(spread):
    names = {"cache-a", "cache-b", "cache-c", "proxy", *HOST}

    def told(host):
        (facts,) = spread.spread.status(host)
        others = facts["hosts"]
        assert {p["name"] for p in facts["processes"]} | {p["name"] for o in others for p in o["processes"]} == names
        assert {other["host"] for other in others} == set("abc") - {host}
        return facts["state"] == "ready" and {other["told_by"] for other in others} == {"its daemon"}

    for host in "abc":
        spread.waits_for(lambda host=host: told(host), f"{host} tells of all, as their daemons say it")


def test_prefill_on_one_host_decode_on_another(spread):
    """One request at a time, every pair of producer and consumer; what goes over was pushed while it was computed."""
    before = {host: spread.sent(host) for host in "ac"}
    pairs = set()
    for i in range(4):
        answer = spread.ask(i)
        spread.right(i, answer)
        assert answer.route == "pd"
        pairs.add(spread.pair(answer))
    assert len(pairs) >= 2
    rng = random.Random()

    def went_over():
        """Whether it has; else one more request, of which some cross: on a busy machine one may have come too late."""
        logs = spread.spread.log("b", "decode-0") + spread.spread.log("c", "decode-1")
        if "from peer" in logs and sum(spread.sent(host) - before[host] for host in "ac") > 0:
            return True
        spread.spread.complete("b", spread.proxy, [rng.randrange(1000, 40000) for _ in range(300)])
        return False

    spread.crosses(pairs)
    spread.waits_for(went_over, "a consumer has loaded what another host sent", 240)


def test_two_producers_two_consumers_at_once(spread):
    chosen = [4, 5, 6, 7]
    answers = spread.spread.together("b", spread.proxy, [prompt(i) for i in chosen], cache_salt=spread.salt)
    for i, answer in zip(chosen, answers, strict=True):
        assert answer.status == 200, answer.body
        spread.right(i, answer)
    spread.released(*"abc")


def test_what_another_host_computed_is_not_computed_again(spread):
    """Straight to the engines: the producer on a computes, the consumer on b finds it there, without any handover."""
    rng = random.Random()
    for i in range(5):  # the consumer has computed nothing yet: how slow it is, and fetching worth it, is not known
        own = [rng.randrange(1000, 40000) for _ in range(150 + 70 * i)]
        assert spread.spread.complete("b", spread.engine("b", 22630), own, tokens=3).status == 200
    before = spread.spread.log("b", "decode-0").count("from peer")

    def both_ask(tokens):
        first = spread.spread.complete("b", spread.engine("a", 22620), tokens, cache_salt=spread.salt)
        assert first.status == 200, first.body
        spread.waits_for(
            lambda: spread.peers("b")["a"]["chunks"] >= spread.spread.daemon("a")["chunks"], "b learns of it"
        )
        second = spread.spread.complete("b", spread.engine("b", 22630), tokens, cache_salt=spread.salt)
        assert second.ids == first.ids
        return first

    spread.right(8, both_ask(prompt(8)))
    for _ in range(8):  # on a busy machine the first may have been predicted to come too late
        if (log := spread.spread.log("b", "decode-0")).count("from peer") > before:
            break
        both_ask([rng.randrange(1000, 40000) for _ in range(560)])
    facts = [line for line in spread.metrics("b").splitlines() if line.startswith("pdserve_peer")]
    assert log.count("from peer") > before, "\n".join([*facts, *log.splitlines()[-15:]])
    assert 'pdserve_peer_pull_decisions_total{decision="pull"}' in "\n".join(facts)


def test_one_packet_in_a_hundred_is_lost(spread):
    try:
        for host in "abc":
            spread.net[host].lose(0.01)
        spread.right(9, spread.ask(9))
        spread.right(10, spread.ask(10))
    finally:
        spread.mended(*"abc")


def test_a_slow_link(spread):
    """What does not arrive in time is computed by the consumer."""
    try:
        spread.net["a"].limit("10mbit")
        spread.net["c"].limit("10mbit")
        spread.right(11, spread.ask(11))
    finally:
        spread.mended(*"abc")
    spread.released(*"abc")


def test_fifty_milliseconds_away(spread):
    """Every TCP connection between the hosts goes over a relay that holds back what it carries by 25 ms each way."""
    relays, before = [], [spread.sent(host) for host in "ac"]
    try:
        for host in "abc":
            relays.append(Relay(spread.net[host], 22700, None, 0.025))
        # Connections from before break when they are used; those that follow are far away.
        spread.waits_for(lambda: all(relay.carried > 1 for relay in relays), "all hosts use their relays")
        spread.mended(*"abc")
        answers = [spread.ask(i) for i in (15, 16)]
        for i, answer in zip((15, 16), answers, strict=True):
            spread.right(i, answer)
        spread.crosses({spread.pair(answer) for answer in answers})
        rng = random.Random()

        def went_over():
            if sum(spread.sent(host) for host in "ac") > sum(before):
                return True
            spread.spread.complete("b", spread.proxy, [rng.randrange(1000, 40000) for _ in range(300)])
            return False

        spread.waits_for(went_over, "something was sent over the relays", 240)
        spread.released(*"abc")
    finally:
        for relay in relays:
            relay.close()
        spread.mended(*"abc")


def test_a_peer_that_stops_reading(spread):
    """The cache daemon of host c is stopped: it accepts and never answers, neither its peers nor the engines beside it."""
    daemon = spread.pid("c", "cache-c")
    os.kill(daemon, signal.SIGSTOP)
    try:
        answers = spread.spread.together("b", spread.proxy, [prompt(i) for i in (17, 18)], cache_salt=spread.salt)
        for i, answer in zip((17, 18), answers, strict=True):
            assert answer.status == 200, answer.body
            spread.right(i, answer)
        spread.waits_for(lambda: spread.peers("a")["c"]["state"] == "down", "a leaves c alone")
        spread.released(*"ab")
    finally:
        os.kill(daemon, signal.SIGCONT)
        spread.mended(*"abc")
    spread.released(*"abc")


def test_the_link_is_cut_in_the_middle_of_a_transfer(spread):
    """Host a is gone from the network while it prefills, pushes or has just done so; the request is answered all the same."""
    answers = {}
    asking = [threading.Thread(target=lambda i=i: answers.update({i: spread.ask(i)})) for i in (12, 13)]
    try:
        spread.net["a"].limit("60mbit")
        for thread in asking:
            thread.start()
        deadline = time.monotonic() + 90
        while not any(p["outgoing"] for p in spread.spread.daemon("a")["peers"]["peers"]):
            assert time.monotonic() < deadline, "nothing was ever pushed by a"
            time.sleep(0.05)
        spread.net["a"].cut()
        for thread in asking:
            thread.join(240)
    finally:
        spread.net["a"].mend()
    for i in (12, 13):
        assert i in answers, f"request {i} was not answered"
        spread.right(i, answers[i])
    spread.mended("b", "a", "c")
    spread.released(*"abc")


def test_a_whole_host_dies(spread):
    """Host c, with a producer and a consumer on it, loses power while it works."""
    answers = {}
    asking = [threading.Thread(target=lambda i=i: answers.update({i: spread.ask(i)})) for i in (14, 0)]
    for thread in asking:
        thread.start()
    time.sleep(1.0)
    spread.net["c"].kill()
    for thread in asking:
        thread.join(240)
    for i in (14, 0):
        assert i in answers, f"request {i} was not answered"
        spread.right(i, answers[i])

    def unreachable():
        (facts,) = spread.spread.status("b")
        states = {other["host"]: other["state"] for other in facts["hosts"]}
        return (facts["state"], states["c"]) == ("degraded", "unreachable")

    spread.waits_for(unreachable, "the status says that c is gone")
    answer = spread.ask(3)  # what is left is one producer and one consumer on two hosts
    spread.right(3, answer)
    assert (answer.headers["x-pdserve-prefill"], answer.headers["x-pdserve-decode"]) == ("prefill-0", "decode-0")
    spread.released(*"ab")
    if (supervisor := spread.spread.supervisors.pop("c", None)) is not None:  # not in a second try
        supervisor.wait(60)


def test_stop_leaves_nothing(spread):
    spread.spread.stop()
    for host in spread.net.hosts.values():
        assert host.processes() == []
    left = [p for p in Path("/dev/shm").glob(f"pdserve-hosts{os.getpid()}@[ab]*")]
    assert left == []
    assert (
        json.loads((spread.spread.folder / "a" / f"{spread.spread.name}@a" / "state.json").read_text())["state"]
        == "stopped"
    )

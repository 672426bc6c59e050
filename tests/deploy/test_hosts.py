"""Planning over several hosts, waiting for what runs elsewhere, and the other hosts in the status."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from pdserve import topology
from pdserve.deploy import hosts, others, preflight, state
from pdserve.deploy import plan as plans
from pdserve.deploy.backends.local import LocalBackend
from pdserve.deploy.hosts import Elsewhere
from pdserve.deploy.plan import Plan, Process
from pdserve.deploy.supervise import Settings, Supervisor
from pdserve.errors import ConfigError, StartError

THREE = """
name: three
model: demo
hosts:
  - {name: a, address: 10.0.0.1}
  - {name: b, address: 10.0.0.2, peer_url: "ucx://10.9.0.2:7901"}
  - {name: c, address: 10.0.0.3}
engine: {device: cpu, start_timeout: 100}
prefill: [{port: 8100, host: a}]
decode: [{port: 8200, host: b}]
plain: [{port: 8300, host: c}]
cache: {size: 1GiB, disk: {size: 1GiB}}
peers: {secret_file: /etc/secret}
proxy: {host: c}
"""


def planned(host: str, text: str = THREE) -> Plan:
    return plans.make(topology.parse(text), [0, 1], python="/venv/bin/python", run_root=Path("/run"), host=host)


def of(plan: Plan, name: str) -> Process:
    return next(process for process in plan.processes if process.name == name)


def words(process: Process, flag: str) -> list[str]:
    return [process.argv[i + 1] for i, word in enumerate(process.argv) if word == flag]


def test_each_host_gets_its_part() -> None:
    assert [p.name for p in planned("a").processes] == ["cache-a", "prefill-0"]
    assert [p.name for p in planned("b").processes] == ["cache-b", "decode-0"]
    assert [p.name for p in planned("c").processes] == ["plain-0", "proxy"]  # plain engines use no cache
    a = planned("a")
    assert a.label == "three@a"
    assert a.run_dir == Path("/run/three@a")
    assert of(a, "cache-a").leftovers[0] == Path("/dev/shm/pdserve-three@a.arena")
    assert a.url == "http://10.0.0.3:8000"  # where clients go, from wherever one looks


def test_daemons_know_each_other() -> None:
    cache = of(planned("a"), "cache-a")
    assert words(cache, "--peer-listen") == ["tcp://10.0.0.1:7900"]
    assert words(cache, "--host-name") == ["a"]
    # b's daemon is reached on another network than its engines: it goes by their address, too
    assert words(cache, "--peer") == ["a=tcp://10.0.0.1:7900", "b,10.0.0.2=ucx://10.9.0.2:7901"]
    assert words(cache, "--peer-secret-file") == ["/etc/secret"]
    assert words(cache, "--state") == ["/run/three@a/state.json"]
    found = of(planned("a", THREE.replace("peers: {", "peers: {discover: 'etcd://10.0.0.9:2379/kv', ")), "cache-a")
    assert words(found, "--peers-from") == ["etcd://10.0.0.9:2379/kv"]
    assert words(of(planned("b"), "cache-b"), "--peer-listen") == ["ucx://10.9.0.2:7901"]


def test_the_proxy_knows_who_runs_where_and_waits_for_them() -> None:
    proxy = of(planned("c"), "proxy")
    assert words(proxy, "--place") == ["prefill-0=a", "decode-0=b"]
    assert {(e.name, e.host, e.ready_url) for e in proxy.awaits} == {
        ("prefill-0", "a", "http://10.0.0.1:8100/health"),
        ("decode-0", "b", "http://10.0.0.2:8200/health"),
    }
    assert all(e.start_timeout == hosts.CACHE_SECONDS + 100 for e in proxy.awaits)
    assert words(proxy, "--cache") == []  # their HTTP sides are on their own loopbacks


def test_open_admin_addresses_are_passed_to_the_proxy() -> None:
    text = THREE.replace("cache: {size: 1GiB,", "cache: {size: 1GiB, admin_host: 0.0.0.0,")
    caches = words(of(planned("c", text), "proxy"), "--cache")
    assert caches == ["cache-a=http://10.0.0.1:8080", "cache-b=http://10.0.0.2:8080"]


def test_all_hosts_in_one_plan() -> None:
    plan = plans.make_all(topology.parse(THREE), {name: [0] for name in "abc"}, run_root=Path("/run"))
    assert [(p.host, p.name) for p in plan.processes] == [
        ("a", "cache-a"), ("a", "prefill-0"), ("b", "cache-b"), ("b", "decode-0"), ("c", "plain-0"), ("c", "proxy"),
    ]  # fmt: skip
    proxy = of(plan, "proxy")
    assert proxy.awaits == ()
    assert set(proxy.depends) == {"prefill-0", "decode-0"}


def test_which_host_must_be_said() -> None:
    with pytest.raises(ConfigError, match=r"--host: missing: this topology has the hosts a, b, c.*--host a"):
        planned("")
    with pytest.raises(ConfigError, match=r"--host: 'x' is not one of the hosts"):
        planned("x")
    with pytest.raises(ConfigError, match=r"--host: 'a', but the topology has no hosts"):
        planned("a", "name: one\nmodel: demo\nengine: {device: cpu}\nboth: [{port: 1}]\n")


def test_a_secret_is_asked_for_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = THREE.replace("peers: {secret_file: /etc/secret}\n", "")
    monkeypatch.delenv("PDSERVE_PEER_SECRET", raising=False)
    with pytest.raises(ConfigError, match="PDSERVE_PEER_SECRET"):
        preflight.check_peers(planned("a", text))
    preflight.check_peers(planned("c", text))  # no daemon there
    preflight.check_peers(planned("a"))
    monkeypatch.setenv("PDSERVE_PEER_SECRET", "x" * 32)
    preflight.check_peers(planned("a", text))


class Late:
    """Answers 503 until told otherwise."""

    def __init__(self) -> None:
        self.ready = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if outer.ready else 503)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/health"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def waiting(plan: Plan, url: str, seconds: float) -> Plan:
    from dataclasses import replace

    other = Elsewhere("decode-9", "decode", "far", url, url, seconds)
    first, *rest = plan.processes
    return replace(plan, processes=(replace(first, awaits=(other,)), *rest))


FAST = Settings(watch_every=0.05, probe_every=0.05)


def test_a_process_starts_when_the_other_host_is_ready(make_plan: Any) -> None:
    late = Late()
    try:
        plan = waiting(make_plan(one="ok"), late.url, 60)
        seen: list[tuple[str, str]] = []

        async def story() -> None:
            ready = asyncio.Event()

            def changed(deployment: state.Deployment) -> None:
                record = deployment.processes[0]
                seen.append((record.state, record.detail))
                if record.detail == "for decode-9 on host far":
                    late.ready = True
                if deployment.state in ("ready", "failed"):
                    ready.set()

            supervisor = Supervisor(plan, LocalBackend(0.3), FAST, changed)
            running = asyncio.create_task(supervisor.run())
            await asyncio.wait_for(ready.wait(), 120)
            supervisor.stop()
            await running

        asyncio.run(story())
        assert ("waiting", "for decode-9 on host far") in seen
        assert any(s == "ready" for s, _ in seen)
    finally:
        late.close()


def test_waiting_for_another_host_has_an_end(make_plan: Any) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        plan = waiting(make_plan(one="ok"), f"http://127.0.0.1:{nobody.getsockname()[1]}/health", 0.3)
        with pytest.raises(StartError, match=r"decode-9 on host far was not ready within 0\.3 s.*--host far"):
            asyncio.run(Supervisor(plan, LocalBackend(0.3), FAST).run())


# ---- status ----


def deployment(**more: Any) -> state.Deployment:
    facts = {
        "run_dir": "/x",
        "topology": "",
        "model": "m",
        "url": "u",
        "pid": 1,
        "created": 0.0,
        "started": time.time(),
    }
    return state.Deployment(name="t@a", host="a", **facts, **more)


def test_other_hosts_are_told_by_their_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    import msgspec

    theirs = deployment(
        processes=[state.ProcessRecord("decode-0", "decode", "u", "u/health", "log", "ready")], state="ready"
    )
    elsewhere = [Elsewhere("decode-0", "decode", "b", "u", "u/health"), Elsewhere("x", "both", "c", "v", "")]
    mine = deployment(elsewhere=elsewhere)
    text = json.loads(msgspec.json.encode(theirs))
    monkeypatch.setattr(others, "_told", lambda d: {"b": msgspec.convert(text, state.Deployment)})
    b, c = others.states(mine)
    assert (b["host"], b["state"], b["told_by"], b["processes"][0]["name"]) == ("b", "ready", "its daemon", "decode-0")
    assert (c["host"], c["state"], c["told_by"], c["processes"][0]["state"]) == ("c", "unreachable", "probe", "unknown")


def test_other_hosts_are_probed_when_nobody_tells() -> None:
    late = Late()
    late.ready = True
    try:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            dead = f"http://127.0.0.1:{nobody.getsockname()[1]}/health"
            elsewhere = [Elsewhere("d-0", "decode", "b", "u", late.url), Elsewhere("d-1", "decode", "c", "u", dead)]
            elsewhere += [Elsewhere("d-2", "decode", "d", "u", late.url), Elsewhere("cache-d", "cache", "d", "", "")]
            own = state.ProcessRecord("cache-a", "cache", "u", "u/health", "log", "failed")
            b, c, d = others.states(deployment(elsewhere=elsewhere, processes=[own]))
            without_a_daemon = others.states(deployment(elsewhere=elsewhere))
        assert (b["state"], b["processes"][0]["state"]) == ("ready", "ready")
        assert (d["state"], d["processes"][1]["state"]) == ("degraded", "unknown")  # its daemon should have told
        assert without_a_daemon[2]["state"] == "ready"  # nobody here could have asked it
        assert (c["state"], c["processes"][0]["state"]) == ("unreachable", "unreachable")
        assert "does not answer" in c["processes"][0]["detail"]
    finally:
        late.close()

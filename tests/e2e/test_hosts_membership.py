"""Daemons that find each other by a DNS name or in etcd: joining, leaving and crashing while the others go on."""

import shutil
import signal
import subprocess
from pathlib import Path

import httpx
import netns
import pytest
from hosts_daemons import PEER_PORT, Daemon, until

pytestmark = pytest.mark.skipif(bool(netns.missing()), reason=netns.missing() or "-")


@pytest.fixture
def net():
    made = netns.Net("a", "b", "c")
    yield made
    made.close()


def alone(net, name):
    """What a daemon is told by hand: only itself."""
    return [f"{name}=tcp://{net[name].address}:{PEER_PORT}"]


def names(daemon, state="up"):
    status = daemon.status()
    return {p["name"] for p in status["peers"]["peers"] if p["state"] == state} if status else set()


def test_a_name_whose_addresses_change(net, tmp_path):
    """As a headless service has them: one address for each daemon, asked for again and again."""
    folders = [Path(f"/etc/netns/{host.namespace}") for host in net.hosts.values()]
    original = Path("/etc/hosts").read_text()

    def service(*members):
        lines = "".join(f"{net[m].address} kv-peers\n" for m in members)
        for folder in folders:  # bound over /etc/hosts for what runs on that host; written in place, so that it is seen
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hosts").write_text(original + lines)

    daemons = []
    try:
        service("a", "b")
        options = ["--peers-from", f"dns://kv-peers:{PEER_PORT}?transport=tcp"]
        daemons = [Daemon(net, name, tmp_path, alone(net, name), options=options) for name in "abc"]
        a, b, c = daemons
        for daemon in daemons:
            daemon.ready()
        until(lambda: names(a) == {"b"}, "a finds b, and itself is no peer")
        service("a", "b", "c")
        until(lambda: names(a) == {"b", "c"} == names(a), "c joins")
        c.put(range(3))
        a.knows("c", 3)
        a.gets(range(3))
        service("a", "b")
        until(lambda: names(a) == {"b"}, "c leaves")
        until(lambda: names(b) == {"a"}, "c leaves for b, too: each asks in its own time")
        assert b.fetch([77]) == 0
    finally:
        for daemon in daemons:
            daemon.stop()
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed (Debian: etcd-server)")
def test_meeting_in_etcd(net, tmp_path):
    host = net["a"]
    client, peer = f"http://{host.address}:22520", f"http://{host.address}:22521"
    words = [
        "etcd",
        "--data-dir",
        str(tmp_path / "etcd"),
        "--listen-client-urls",
        client,
        "--advertise-client-urls",
        client,
    ]
    words += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"]
    server = host.start(words, tmp_path / "etcd.log")
    daemons = []

    def well():
        try:
            with host.inside():
                return httpx.get(f"{client}/health", trust_env=False, timeout=2).json()["health"] == "true"
        except (httpx.HTTPError, ValueError):
            return False

    try:
        until(well, "etcd is up", 120)
        options = ["--peers-from", f"etcd://{host.address}:22520/kv"]
        a = Daemon(net, "a", tmp_path, alone(net, "a"), options=options)
        b = Daemon(net, "b", tmp_path, alone(net, "b"), options=options)
        daemons = [a, b]
        for daemon in daemons:
            daemon.ready()
        until(lambda: names(a) == {"b"} and names(b) == {"a"}, "they meet")
        c = Daemon(net, "c", tmp_path, alone(net, "c"), options=options)
        daemons.append(c)
        c.ready()
        until(lambda: names(a) == {"b", "c"}, "another joins")
        server.send_signal(signal.SIGSTOP)  # it accepts and never answers
        until(lambda: "stays as it was: etcd" in a.log.read_text(), "a says so")
        assert {p["name"] for p in a.status()["peers"]["peers"]} == {"b", "c"}, "nobody leaves for that"
        server.send_signal(signal.SIGCONT)
        b.stop()  # says goodbye to etcd as well
        until(lambda: names(a) == {"c"} and "b" not in names(a, "down"), "b has left")
        c.signal(signal.SIGKILL)
        until(lambda: not names(a) and not names(a, "down"), "the crashed one ends with its lease", 120)
    finally:
        for daemon in daemons:
            if daemon.process.poll() is None or daemon.process.returncode == -signal.SIGKILL:
                daemon.stop()
        server.kill()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            raise AssertionError("etcd did not end") from None

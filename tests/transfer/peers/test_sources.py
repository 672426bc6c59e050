"""Where the list of peers comes from. etcd is a real server where it is installed."""

import shutil
import socket
import subprocess
import time

import httpx
import pytest
from ports import free_port

from pdserve.errors import ConfigError
from pdserve.transfer.peers import sources
from pdserve.transfer.peers.sources import Dns, Etcd, Several, SourceError, Static


def test_a_written_list():
    assert Static(["b=tcp://10.0.0.2:7900", "tcp://10.0.0.3:7900"]).peers() == {
        "tcp://10.0.0.2:7900": "b",
        "tcp://10.0.0.3:7900": "",
    }
    with pytest.raises(ConfigError, match=r"--peer\[0\].*'b=10.0.0.2'"):
        Static(["b=10.0.0.2"])


def test_a_name_with_several_addresses():
    answers = [["10.0.0.2", "10.0.0.1", "10.0.0.2"], ["10.0.0.1", "fd00::3"]]
    dns = Dns("kv.svc", 7900, "tcp", lambda host, port: answers.pop(0))
    assert list(dns.peers()) == ["tcp://10.0.0.1:7900", "tcp://10.0.0.2:7900"]
    assert list(dns.peers()) == ["tcp://10.0.0.1:7900", "tcp://[fd00::3]:7900"]  # one left, one joined


def test_the_real_resolver():
    assert "tcp://127.0.0.1:7900" in Dns("localhost", 7900, "tcp").peers()
    with pytest.raises(SourceError, match=r"no-such-host\.invalid"):
        Dns("no-such-host.invalid", 7900, "tcp").peers()


def test_a_source_that_fails_makes_nobody_leave():
    class Moody:
        fails = False

        def peers(self):
            if self.fails:
                raise SourceError("down")
            return {"tcp://10.0.0.9:1": "moody"}

        def close(self):
            pass

    moody, told = Moody(), []
    both = Several([Static(["a=tcp://10.0.0.1:1"]), moody], told.append)
    before = both.peers()
    moody.fails = True
    assert both.peers() == before == {"tcp://10.0.0.1:1": "a", "tcp://10.0.0.9:1": "moody"}
    assert told == ["the list of peers stays as it was: down"]


@pytest.mark.parametrize("text", ["consul://h:1", "dns://h", "etcd:///x", "dns://h:port"])
def test_what_is_not_a_source_is_said_so(text):
    with pytest.raises(ConfigError, match="--peers-from"):
        sources.build([], text, "tcp://1.1.1.1:1", "a", print)


# ---- etcd ----


@pytest.fixture(scope="module")
def etcd(tmp_path_factory):
    program = shutil.which("etcd")
    if program is None:
        pytest.skip("etcd is not installed (Debian: etcd-server)")
    folder = tmp_path_factory.mktemp("etcd")
    ports = [free_port() for _ in range(2)]
    client, peer = (f"http://127.0.0.1:{port}" for port in ports)
    words = [program, "--data-dir", str(folder), "--listen-client-urls", client, "--advertise-client-urls", client]
    words += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"{client}/health", trust_env=False, timeout=10).json()["health"] == "true":
                    break
            except (httpx.HTTPError, ValueError):
                pass
            assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
            assert server.poll() is None, (folder / "log").read_text()[-2000:]
            time.sleep(0.1)
        yield f"127.0.0.1:{ports[0]}"
    finally:
        server.kill()
        server.wait(30)


def test_members_of_etcd_come_and_go(etcd):
    a = Etcd(etcd, "/kv/one", "tcp://10.0.0.1:7900", "a")
    b = Etcd(etcd, "/kv/one", "tcp://10.0.0.2:7900", "b")
    other = Etcd(etcd, "/kv/one-more", "tcp://10.0.0.3:7900", "c")
    assert a.peers() == {"tcp://10.0.0.1:7900": "a"}
    both = {"tcp://10.0.0.1:7900": "a", "tcp://10.0.0.2:7900": "b"}
    assert b.peers() == both == a.peers()
    assert other.peers() == {"tcp://10.0.0.3:7900": "c"}
    b.close()  # leaves at once
    assert a.peers() == {"tcp://10.0.0.1:7900": "a"}
    a.close()
    other.close()


def test_a_crashed_member_of_etcd_ends_with_its_lease(etcd, monkeypatch):
    monkeypatch.setattr(sources, "LEASE_S", 2)
    a = Etcd(etcd, "/kv/two", "tcp://10.0.0.1:7900", "a")
    crashed = Etcd(etcd, "/kv/two", "tcp://10.0.0.2:7900", "b")
    crashed.peers()
    assert len(a.peers()) == 2
    crashed._http.close()  # no goodbye
    deadline = time.monotonic() + 90
    while len(a.peers()) == 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert a.peers() == {"tcp://10.0.0.1:7900": "a"}  # our own was kept alive meanwhile
    a.close()


def test_an_entry_that_etcd_has_lost_is_made_anew(etcd):
    a = Etcd(etcd, "/kv/three", "tcp://10.0.0.1:7900", "a")
    a.peers()
    a._post("lease/revoke", {"ID": a._lease})
    assert a.peers() == {"tcp://10.0.0.1:7900": "a"}
    a.close()


def test_what_is_no_entry_is_passed_over(etcd):
    a = Etcd(etcd, "/kv/four", "tcp://10.0.0.1:7900", "a")
    for i, value in enumerate((b"hello", b"[]", b'{"name": "x"}', b'{"url": 5}', b"\xff", b"")):
        a._post("kv/put", {"key": sources._b64(f"/kv/four/{i}".encode()), "value": sources._b64(value)})
    assert a.peers() == {"tcp://10.0.0.1:7900": "a"}
    a.close()


def test_an_address_of_nobody_is_not_told_to_others():
    with pytest.raises(ConfigError, match=r"--peer-listen: tcp://0\.0\.0\.0:7900 is no address"):
        sources.build([], "etcd://127.0.0.1:1/kv", "tcp://0.0.0.0:7900", "a", print)


def test_no_etcd_is_an_error_in_words():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        source = Etcd(f"127.0.0.1:{nobody.getsockname()[1]}", "kv", "tcp://10.0.0.1:1", "a")
        with pytest.raises(SourceError, match="etcd: ConnectError"):
            source.peers()
        source.close()

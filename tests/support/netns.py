"""Hosts made of network namespaces: each with an address of its own on one switch, and links that can be made bad.

Needs root, iproute2, and iptables for loss; `missing()` says what is not there. Everything carries this process's id in its
name, so that runs do not meet; close() takes it all away, with what still runs inside.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_serial = 0


def missing() -> str:
    """Why hosts cannot be made here; empty when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: iproute2)"
    name = f"pdx{os.getpid()}"
    made = _try("ip", "netns", "add", name)
    if made.returncode:
        return f"network namespaces cannot be made: {made.stderr.strip()}"
    veth = _try("ip", "-n", name, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
    _try("ip", "netns", "del", name)
    return f"veth links cannot be made: {veth.stderr.strip()}" if veth.returncode else ""


def _try(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=20)


def _do(*words: str) -> str:
    done = _try(*words)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()}"
    return done.stdout


class Host:
    """One namespace. Its link is called eth0."""

    def __init__(self, name: str, namespace: str, address: str) -> None:
        self.name, self.namespace, self.address = name, namespace, address
        self.env: dict[str, str] = {}  # for what is started here

    def start(self, words: list[str], log: Path, **env: str) -> subprocess.Popen[bytes]:
        """A process on this host, leading a session of its own."""
        with log.open("ab") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *words],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                env={**os.environ, **self.env, **env},
            )  # fmt: skip

    def run(self, *words: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **self.env}
        inside = ("ip", "netns", "exec", self.namespace, *words)
        return subprocess.run(inside, capture_output=True, text=True, timeout=timeout, env=env)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread is on that host: sockets that it opens belong there, for good."""
        own = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        there = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(there)
            yield
        finally:
            _setns(own)
            os.close(own)
            os.close(there)

    # ---- what goes wrong ----

    def cut(self) -> None:
        """The cable is pulled out: nothing comes or goes, and nobody is told."""
        _do("ip", "netns", "exec", self.namespace, "iptables", "-I", "INPUT", "-i", "eth0", "-j", "DROP")
        _do("ip", "netns", "exec", self.namespace, "iptables", "-I", "OUTPUT", "-o", "eth0", "-j", "DROP")

    def lose(self, share: float) -> None:
        """So many of the packets that come in are dropped. Segmentation is left to the processor, so that a drop is one packet."""
        rule = ("-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP")
        _do("ip", "netns", "exec", self.namespace, "iptables", "-I", "INPUT", "-i", "eth0", *rule)

    def limit(self, rate: str) -> None:
        """What leaves this host is held to the rate, e.g. 100mbit."""
        shape = ("rate", rate, "burst", "256kb", "latency", "50ms")  # a switch of today, not a deep buffer
        _do("tc", "-n", self.namespace, "qdisc", "replace", "dev", "eth0", "root", "tbf", *shape)

    def redirect(self, port: int, mark: int) -> None:
        """Every TCP connection that would leave this host goes to that port of its own, unless its socket has the mark."""
        wanted = ("-o", "eth0", "-p", "tcp", "-m", "mark", "!", "--mark", str(mark))
        words = ("-t", "nat", "-A", "OUTPUT", *wanted, "-j", "REDIRECT", "--to-ports", str(port))
        _do("ip", "netns", "exec", self.namespace, "iptables", *words)

    def redirect_no_more(self) -> None:
        _try("ip", "netns", "exec", self.namespace, "iptables", "-t", "nat", "-F", "OUTPUT")

    def mend(self) -> None:
        """All is well again."""
        _try("ip", "netns", "exec", self.namespace, "iptables", "-F")
        _try("tc", "-n", self.namespace, "qdisc", "del", "dev", "eth0", "root")

    def processes(self) -> list[int]:
        return [int(pid) for pid in _try("ip", "netns", "pids", self.namespace).stdout.split()]

    def kill(self, seconds: float = 10.0) -> None:
        """The host loses power: everything on it ends at once."""
        deadline = time.monotonic() + seconds
        while pids := self.processes():
            assert time.monotonic() < deadline, f"{self.name}: {pids} cannot be killed"
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


class Net:
    """Some hosts on one switch, 10.201.N.1 and up."""

    def __init__(self, *names: str) -> None:
        global _serial
        _serial += 1
        self._base = f"pd{os.getpid()}n{_serial}"
        self._switch = f"{self._base}-sw"
        self.hosts: dict[str, Host] = {}
        third = (os.getpid() * 7 + _serial) % 250
        try:
            _do("ip", "netns", "add", self._switch)
            _do("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
            _do("ip", "-n", self._switch, "link", "set", "br0", "up")
            for i, name in enumerate(names):
                self._add(name, f"10.201.{third}.{i + 1}")
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def _add(self, name: str, address: str) -> None:
        namespace, port = f"{self._base}-{name}", f"p-{name}"
        _do("ip", "netns", "add", namespace)
        self.hosts[name] = Host(name, namespace, address)
        link = ("type", "veth", "peer", "name", port, "netns", self._switch)
        _do("ip", "-n", namespace, "link", "add", "eth0", *link)
        _do("ip", "-n", self._switch, "link", "set", port, "master", "br0", "up")
        _do("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _do("ip", "-n", namespace, "link", "set", device, "up")

    def close(self) -> None:
        for host in self.hosts.values():
            host.kill()
        for namespace in [h.namespace for h in self.hosts.values()] + [self._switch]:
            _try("ip", "netns", "del", namespace)
        self.hosts.clear()

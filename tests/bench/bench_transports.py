#!/usr/bin/env python
"""Transports beside the plainest way to do the same, over a veth link between two network namespaces of its own.

    .venv/bin/python -P tests/bench/bench_transports.py [--rounds N] [--json FILE] [--only tcp,ucx,nixl,mooncake,calls]
        [--streams 1,2,4] [--floors hot,cold] [--pin apart|together] [--realtime] [--steer]

What the baselines are:

  bare TCP      threads with sendall and recv_into(MSG_WAITALL), out of and into the same cold memory as ours (256 MiB a round,
                arenas of 512 MiB), no frames, no tickets, no digests: what this machine can do for an arena
  iperf3        one buffer of 1 MiB over and over, and what comes is overwritten at once: all of it stays in the cache
  ... of a file its source is cold (a file in memory of the arena's size), its sink is not; -Z: the same by sendfile
  C             the plainest fast program (transport_floor.cpp) between cold memory and cold memory, nothing decided, nothing digested:
                "hot" is the same program with iperf3's one buffer, "cold" by send, "spin" with a receiver that never sleeps,
                "sendfile" without a copy at the sender, "huge" with huge pages at both ends, as an arena has where the kernel
                gives them. What none of these reaches is not to be had on this machine
  small pages   ours with arenas of small pages
  raw UCX, NIXL tag or WRITE loops, four under way, cold memory as ours

CPU seconds are of both ends, but for Mooncake (the sender alone). "resent" is how many of a million segments the sender's kernel
sent twice. Nothing is lost on this link, so that is packets that overtook others: a veth link hands a packet on by the core that
sent it, and a sender is at times woken on another core than the one where its peer's acknowledgements make the kernel send on.
Without the right to make namespaces, loopback serves and the first line says so.

Where things run decides much on a small machine, so it can be told, for all contenders alike:

  --pin         each end on a core of its own, or both on one
  --realtime    both ends before all other work of the machine: what a busy machine says is then near to what an idle one does
  --steer       each direction's packets on one core whichever sent them, as a network card's queue does: nothing overtakes
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ENDS = Path(__file__).with_name("transport_ends.py")
FLOOR = Path(__file__).with_name("transport_floor.cpp")
#: name -> what it reads from, what it writes to
FLOORS = {
    "hot": ("hot", "hot"),
    "cold": ("cold", "cold"),
    "spin": ("cold", "spin"),
    "sendfile": ("sendfile", "cold"),
    "cold huge": ("huge-cold", "huge-cold"),
    "spin huge": ("huge-cold", "huge-spin"),
    "sendfile huge": ("huge-sendfile", "huge-cold"),
}
MIB = 1 << 20
A, B = "pdbench-a", "pdbench-b"
PORT = 22150


def ran(*words: str) -> str:
    """What a command says, whether it succeeds or not."""
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=30).stdout


class Link:
    """Two hosts: `a` and `b` prefix a command so that it runs there, and where and how it is to."""

    def __init__(self, pin: str = "", realtime: bool = False, steer: bool = False) -> None:
        first = ["chrt", "-f", "10"] if realtime else []
        cores = {"": ("", ""), "apart": ("0", "1"), "together": ("0", "0")}[pin]
        self.a, self.b = ([*first, *(["taskset", "-c", core] if core else [])] for core in cores)
        self._steer = steer
        self.address_a = self.address_b = "127.0.0.1"
        self.words = "loopback: two network namespaces need root and iproute2"

    def up(self) -> None:
        if os.geteuid() or not shutil.which("ip"):
            return
        self.down()
        steps = f"""
            ip netns add {A}
            ip netns add {B}
            ip link add pdbench0 netns {A} type veth peer name pdbench1 netns {B}
            ip -n {A} addr add 10.231.7.1/24 dev pdbench0
            ip -n {B} addr add 10.231.7.2/24 dev pdbench1
            ip -n {A} link set pdbench0 up
            ip -n {B} link set pdbench1 up
            ip -n {A} link set lo up
            ip -n {B} link set lo up
        """
        for step in steps.strip().splitlines():
            done = subprocess.run(step.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                self.words = f"loopback: namespaces cannot be made here ({done.stderr.strip()})"
                self.down()
                return
        self._wait_until_up()
        if self._steer:
            for name, device, cores in ((A, "pdbench0", "2"), (B, "pdbench1", "1")):
                mounted = (
                    "mount -t sysfs sysfs /sys 2>/dev/null"  # this namespace's devices, and seen by this command alone
                )
                path = f"/sys/class/net/{device}/queues/rx-0/rps_cpus"
                ran("ip", "netns", "exec", name, "sh", "-c", f"{mounted}; echo {cores} > {path}")
        self.a, self.b = ["ip", "netns", "exec", A, *self.a], ["ip", "netns", "exec", B, *self.b]
        self.address_a, self.address_b = "10.231.7.1", "10.231.7.2"
        self.words = "veth between two network namespaces"

    def _wait_until_up(self) -> None:
        """The kernel tells of a new link's carrier up to a second later, and UCX takes no device without."""
        until = time.monotonic() + 10
        for name, device in ((A, "pdbench0"), (B, "pdbench1")):
            show = ["ip", "-n", name, "-o", "link", "show", device]
            while "LOWER_UP" not in (said := ran(*show)):
                if time.monotonic() > until:
                    raise SystemExit(f"{device} did not come up within 10 s: {said.strip()}")
                time.sleep(0.05)

    def segments(self) -> tuple[int, int]:
        """(sent, sent again) by host a so far."""
        names, values = (
            line.split() for line in ran(*self.a, "cat", "/proc/net/snmp").splitlines() if line.startswith("Tcp:")
        )
        said = dict(zip(names, values, strict=True))
        return int(said["OutSegs"]), int(said["RetransSegs"])

    def down(self) -> None:
        for name in (A, B):
            ran("ip", "netns", "del", name)


def pair(link: Link, receiver: list[str], sender: Any, program: list[str] | None = None) -> list[dict[str, Any]]:
    """Starts the receiver, asks sender(its first line) for the other end's arguments, returns what that one said."""
    argv = program or [sys.executable, "-P", str(ENDS)]
    there = subprocess.Popen(
        [*link.b, *argv, *receiver], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert there.stdout
    assert there.stdin
    try:
        facts = first_json(there.stdout)
        if not facts:
            raise SystemExit(f"{receiver[0]} did not start: {there.stderr.read()[-2000:] if there.stderr else ''}")
        done = subprocess.run(
            [*link.a, *argv, *sender(facts)], capture_output=True, text=True, timeout=180, check=False
        )
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if not found:
            raise SystemExit(f"{sender(facts)[0]} said nothing: {done.stderr[-2000:]}")
        return found
    finally:
        there.stdin.close()
        ended(there, 5)


def ended(process: subprocess.Popen[Any], patience_s: float = 0.0) -> None:
    """It is given so long to end by itself."""
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(30)


def first_json(lines: Any) -> dict[str, Any]:
    for line in lines:
        if line.startswith("{"):
            facts: dict[str, Any] = json.loads(line)
            return facts
    return {}


def ours(link: Link, scheme: str, query: str, pages: str = "huge") -> list[dict[str, Any]]:
    listen = f"{scheme}://{link.address_b}:0{query}"
    return pair(link, ["serve", listen, pages], lambda facts: ["push", facts["url"], query, pages])


def iperf(link: Link, streams: int, *more: str) -> list[dict[str, Any]]:
    if not shutil.which("iperf3"):
        raise SystemExit("iperf3 is not installed: apt-get install iperf3")
    server = subprocess.Popen(
        [*link.b, "iperf3", "-s", "-1", "-B", link.address_b, "-p", str(PORT)], stdout=subprocess.DEVNULL
    )
    try:
        client = ["iperf3", "-c", link.address_b, "-p", str(PORT), "-P", str(streams)]
        client += ["-C", "cubic", "-l", "1M", "-t", "2", "-J", *more]
        time.sleep(0.5)  # until it listens; trying sooner would use up its one connection
        done = subprocess.run([*link.a, *client], capture_output=True, text=True, timeout=60, check=False)
        report = json.loads(done.stdout)
        if "sum_received" not in report.get("end", {}):
            raise SystemExit(f"iperf3 failed: {report.get('error', done.stderr)}")
        end = report["end"]
    finally:
        ended(server)
    gbs = end["sum_received"]["bits_per_second"] / 8e9
    used = end["cpu_utilization_percent"]
    return [{"gbs": gbs, "cpu_per_gb": (used["host_total"] + used["remote_total"]) / 100 / gbs}]


def iperf_of_a_file(link: Link, streams: int, *more: str) -> list[dict[str, Any]]:
    """iperf3 sends what it reads out of a file in memory that no cache holds: its source is cold then, its sink still is not."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="pdbench-") as cold:
        for _ in range(512):
            cold.write(os.urandom(MIB))
        cold.flush()
        return iperf(link, streams, "-F", cold.name, *more)


def compiled_floor(folder: str) -> list[str]:
    """How to start the plain program; nothing where there is no compiler."""
    cxx = shutil.which(os.environ.get("CXX", "g++"))
    if cxx is None:
        print("no C++ compiler: the rows named C are left out", flush=True)
        return []
    made = f"{folder}/transport_floor"
    subprocess.run(
        [cxx, "-O3", "-march=native", "-std=c++17", "-pthread", "-o", made, str(FLOOR)], check=True, timeout=120
    )
    return [made]


def floor(link: Link, program: list[str], streams: int, kind: str) -> list[dict[str, Any]]:
    source, sink = FLOORS[kind]

    def sender(facts: dict[str, Any]) -> list[str]:
        return ["send", link.address_b, str(facts["port"]), str(streams), source]

    return pair(link, ["recv", link.address_b, str(streams), sink], sender, program)


def plain(link: Link, streams: int) -> list[dict[str, Any]]:
    there = ["plain_serve", link.address_b]
    return pair(link, there, lambda facts: ["plain_push", link.address_b, str(facts["port"]), str(streams)])


def raw(link: Link, what: str) -> list[dict[str, Any]]:
    return pair(
        link, [f"{what}_serve", link.address_b], lambda facts: [f"{what}_push", link.address_b, str(facts["port"])]
    )


def mooncake(link: Link) -> list[dict[str, Any]]:
    def sender(facts: dict[str, Any]) -> list[str]:
        return ["mooncake_push", link.address_a, link.address_b, str(facts["port"]), str(facts["address"])]

    return pair(link, ["mooncake_serve", link.address_b], sender)


def contenders(
    link: Link, only: set[str], options: str, streams: list[int], program: list[str], floors: list[str]
) -> dict[str, Any]:
    """Name -> one run. Those that are compared stand next to each other, so that they see the same machine."""
    found: dict[str, Any] = {}
    if "tcp" in only:
        for n in streams:
            fixed = f"?streams={n}&adapt=0{options}"
            found[f"iperf3 x{n}"] = lambda n=n: iperf(link, n)
            found[f"iperf3 x{n} of a file"] = lambda n=n: iperf_of_a_file(link, n)
            found[f"iperf3 x{n} of a file -Z"] = lambda n=n: iperf_of_a_file(link, n, "-Z")
            for kind in floors if program else ():
                found[f"C {kind} x{n}"] = lambda n=n, kind=kind: floor(link, program, n, kind)
            found[f"bare TCP x{n}"] = lambda n=n: plain(link, n)
            found[f"tcp x{n}"] = lambda q=fixed: ours(link, "tcp", q + "&verify=0")
            found[f"tcp x{n} verified"] = lambda q=fixed: ours(link, "tcp", q)
            found[f"tcp x{n} verified, small pages"] = lambda q=fixed: ours(link, "tcp", q, "small")
        found["tcp adaptive"] = lambda: ours(link, "tcp", f"?verify=1{options}")
    if "calls" in only:
        found["bare ping-pong"] = lambda: pair(
            link, ["echo", link.address_b], lambda facts: ["ping", link.address_b, str(facts["port"])]
        )
    for scheme, name in (("ucx", "raw UCX tags"), ("nixl", "raw NIXL WRITE")):
        if scheme in only:
            found[name] = lambda scheme=scheme: raw(link, scheme)
            tls = "&tls=tcp"
            found[scheme] = lambda scheme=scheme, tls=tls: ours(link, scheme, f"?verify=0{tls}{options}")
    if "mooncake" in only:
        found["Mooncake"] = lambda: mooncake(link)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--options", default="", help="of the URL, for all of ours: &segment=4MiB")
    parser.add_argument("--only", default="tcp,calls,ucx,nixl,mooncake")
    parser.add_argument("--streams", default="1,2,4")
    parser.add_argument(
        "--floors", default="hot,cold,cold huge,sendfile huge", help=f"of the C program: {', '.join(FLOORS)}"
    )
    parser.add_argument("--pin", choices=("apart", "together"), default="")
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--steer", action="store_true")
    args = parser.parse_args()
    if args.realtime and args.pin == "together":
        parser.error("with --realtime each end would keep the other from the core that they share")
    if args.realtime and "spin" in args.floors and args.streams != "1":
        parser.error("with --realtime several receivers that never sleep would keep the senders from every core")
    streams, floors = [int(n) for n in args.streams.split(",")], args.floors.split(",")
    if unknown := set(floors) - set(FLOORS):
        parser.error(f"--floors: no {', '.join(sorted(unknown))}. Known: {', '.join(FLOORS)}")
    link = Link(args.pin, args.realtime, args.steer)
    link.up()
    print(f"{link.words}; medians of {args.rounds} runs in turn; load average {os.getloadavg()[0]:.1f}", flush=True)
    results: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    only = set(args.only.split(","))
    try:
        with tempfile.TemporaryDirectory(prefix="pdbench-") as folder:
            program = compiled_floor(folder) if "tcp" in only else []
            for _ in range(args.rounds):
                for name, run in contenders(link, only, args.options, streams, program, floors).items():
                    note(results[name], link, run)
    finally:
        link.down()
    middle = {name: {key: statistics.median(values) for key, values in row.items()} for name, row in results.items()}
    for name, row in results.items():
        if "stream" in row:  # iperf3 has two speeds on such a link, and the middle says little about which it was
            middle[name]["fastest"] = max(row["stream"])
    show(middle)
    if args.json:
        args.json.write_text(json.dumps({"link": link.words, "load": os.getloadavg(), "results": middle}, indent=1))


def note(row: dict[str, list[float]], link: Link, run: Any) -> None:
    """One run of one contender."""
    sent, again = link.segments()
    for line in run():
        if "gbs" in line:
            size = f"{line['size'] // MIB} MiB" if "size" in line else "stream"
            row[size].append(line["gbs"])
            row[f"cpu {size}"].append(line["cpu_per_gb"])
        else:
            row["calls p50 us"].append(line["calls_us"])
            row["calls p99 us"].append(line["calls_p99_us"])
    sent_now, again_now = link.segments()
    row["resent"].append(1e6 * (again_now - again) / max(1, sent_now - sent))


def show(middle: dict[str, dict[str, float]]) -> None:
    for name, row in middle.items():
        print(f"{name:24}", "  ".join(f"{key} {value:.2f}" for key, value in row.items()))
    print()
    for n in (1, 2, 4):
        for mine in (f"tcp x{n}", f"tcp x{n} verified"):
            for other in (f"iperf3 x{n}", f"iperf3 x{n} of a file", f"iperf3 x{n} of a file -Z", f"bare TCP x{n}"):
                show_ratio(middle, mine, other)
            for kind in FLOORS:
                show_ratio(middle, mine, f"C {kind} x{n}")
        for kind in FLOORS:
            show_ratio(middle, f"C {kind} x{n}", f"iperf3 x{n}")
        if (fastest := middle.get(f"iperf3 x{n}", {}).get("fastest")) and (row := middle.get(f"tcp x{n} verified")):
            words = (f"{size} {row[size] / fastest:.2f}" for size in ("1 MiB", "8 MiB", "32 MiB"))
            print(f"tcp x{n} verified / the fastest run of iperf3 x{n}: {', '.join(words)}")
    for mine, other in (("ucx", "raw UCX tags"), ("nixl", "raw NIXL WRITE"), ("tcp x2", "Mooncake")):
        show_ratio(middle, mine, other)
    if "bare ping-pong" in middle:
        bare = middle["bare ping-pong"]["calls p50 us"]
        for name, row in middle.items():
            if name != "bare ping-pong" and "calls p50 us" in row:
                ours_ = row["calls p50 us"]
                print(f"1000 messages over {name}, p50: {ours_:.0f} us beside {bare:.0f} us bare: {ours_ / bare:.2f}")


def show_ratio(middle: dict[str, dict[str, float]], mine: str, other: str) -> None:
    """Of the speeds, and of the CPU seconds a GB."""
    if mine not in middle or other not in middle:
        return
    words = []
    for size in ("1 MiB", "8 MiB", "32 MiB", "stream"):
        there = size if size in middle[other] else "stream"
        if size in middle[mine] and there in middle[other]:
            speed = middle[mine][size] / middle[other][there]
            used = middle[mine][f"cpu {size}"] / middle[other][f"cpu {there}"]
            words.append(f"{size} {speed:.2f} (CPU {used:.2f})")
    print(f"{mine} / {other}: {', '.join(words)}")


if __name__ == "__main__":
    main()

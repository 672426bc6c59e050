"""How much of a transfer between two hosts is hidden behind the prefill, when chunks are pushed while it runs.

Two hosts made of network namespaces: a producer on one, consumer and proxy on the other, real vLLM on the CPU in bf16. The
link is shaped (tbf) so that moving a prompt's KV takes as long as computing it: the worst case in which hiding still can
be complete. Compared, in turns, for prompts that nobody has seen:

    free      the link as it is: what a request takes when the transfer costs next to nothing
    pushed    the shaped link; chunks go over as they are computed (what pdserve does)
    after     the shaped link; the prompt is prefilled first and then fetched by the consumer: nothing is hidden
    mooncake  the shaped link; Mooncake's transfer engine sends the same bytes over tcp, in pieces of a chunk, as its connector
              does when the prefill has ended: seconds from that end until they are on the other host

hidden = 1 - (pushed - free) / transfer time; pushed - free is what ours takes from the end of the prefill on, to be compared
with Mooncake's seconds.  Needs root, iproute2, vLLM; Mooncake's package and libibverbs1 for its arm.
    python -P tests/bench/bench_push.py [--tokens 3000] [--repetitions 3] [--json]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import hosts_launch
import netns
from hosts_launch import Spread

# Steps of one chunk: what a step computes can only be sent when it has ended, so the last step's part is never hidden.
TOPOLOGY = """
name: hosts{pid}
model: demo
hosts:
  - {{name: a, address: {a}}}
  - {{name: b, address: {b}}}
engine:
  device: cpu
  dtype: bfloat16
  max_model_len: {length}
  max_num_seqs: 4
  max_num_batched_tokens: 256
  kv_cache_space_gib: 1
prefill: [{{port: 22620, host: a, cpus: "0"}}]
decode: [{{port: 22630, host: b, cpus: "1"}}]
cache: {{size: 1GiB, admin_port: 22680}}
peers: {{port: 22690}}
proxy: {{port: 22600, host: b}}
"""


class Bench:
    def __init__(self, spread: Spread, tokens: int, seed: int) -> None:
        self.spread, self.tokens, self._rng = spread, tokens, random.Random(seed)
        self.proxy = f"http://{spread.net['b'].address}:22600"
        self.producer = f"http://{spread.net['a'].address}:22620"
        self.consumer = f"http://{spread.net['b'].address}:22630"

    def prompt(self) -> list[int]:
        return [self._rng.randrange(1000, 40000) for _ in range(self.tokens)]

    def timed(self, host: str, url: str, prompt: list[int]) -> float:
        began = time.perf_counter()
        answer = self.spread.complete(host, url, prompt, tokens=1)
        assert answer.status == 200, answer.body
        return time.perf_counter() - began

    def sent_bytes(self) -> float:
        with (
            self.spread.net["a"].inside(),
            hosts_launch.OPENER.open("http://127.0.0.1:22680/metrics", timeout=10) as answer,
        ):
            text = answer.read().decode()
        lines = [x for x in text.splitlines() if x.startswith("pdserve_peer_bytes_total{") and 'direction="out"' in x]
        return sum(float(x.split()[-1]) for x in lines)

    def through_the_proxy(self) -> tuple[float, float]:
        """(seconds to the first token, bytes that went over)."""
        before = self.sent_bytes()
        seconds = self.timed("b", self.proxy, self.prompt())
        return seconds, self.sent_bytes() - before

    def after(self) -> float:
        """Prefill, then fetch: the consumer is asked when the producer has answered, and finds the chunks there."""
        prompt = self.prompt()
        seconds = self.timed("a", self.producer, prompt)
        self._known()
        return seconds + self.timed("b", self.consumer, prompt)

    def _known(self) -> None:
        """The consumer's daemon has heard of them; not a part of what is measured."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            held = self.spread.daemon("a")["chunks"]
            if any(p["chunks"] >= held for p in self.spread.daemon("b")["peers"]["peers"]):
                return
            time.sleep(0.05)


def mooncake(net: netns.Net, nbytes: int, chunk: int, times: int) -> list[float]:
    """Seconds for the same bytes from a to b; nothing where Mooncake is not installed."""
    if importlib.util.find_spec("mooncake") is None:
        return []
    ends = [sys.executable, "-P", str(Path(__file__).with_name("transport_ends.py"))]
    inside = ["ip", "netns", "exec", net["b"].namespace]
    there = subprocess.Popen(
        [*inside, *ends, "mooncake_serve", net["b"].address],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert there.stdout
    try:
        facts = next((json.loads(line) for line in there.stdout if line.startswith("{")), None)
        if facts is None:
            print("bench_push: Mooncake's transfer engine does not start (libibverbs1?); left out", file=sys.stderr)
            return []
        words = [net["a"].address, net["b"].address, *(str(facts[key]) for key in ("port", "address"))]
        words += [str(number) for number in (nbytes, chunk, times)]
        done = net["a"].run(*ends, "mooncake_send", *words, timeout=600)
        found = [json.loads(line)["seconds"] for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(found) == times, done.stderr[-2000:]
        return found
    finally:
        there.kill()
        there.wait(30)


def measure(bench: Bench, repetitions: int) -> dict[str, Any]:
    for _ in range(2):  # the first requests compile, and say how fast everything is
        bench.through_the_proxy()
    prefill = statistics.median(bench.timed("a", bench.producer, bench.prompt()) for _ in range(repetitions))
    free = [bench.through_the_proxy() for _ in range(repetitions)]
    nbytes = statistics.median(moved for _, moved in free)
    rate = nbytes / prefill
    bench.spread.net["a"].limit(f"{int(rate * 8 / 1000)}kbit")
    pushed, after = [], []
    for _ in range(repetitions):
        pushed.append(bench.through_the_proxy()[0])
        after.append(bench.after())
    theirs = mooncake(bench.spread.net, int(nbytes), int(nbytes * 256 / bench.tokens), repetitions)
    bench.spread.net["a"].mend()
    base, with_push = statistics.median(t for t, _ in free), statistics.median(pushed)
    transfer = nbytes / rate
    return {
        "tokens": bench.tokens,
        "prefill_s": round(prefill, 3),
        "transfer_s": round(transfer, 3),
        "megabytes": round(nbytes / 1e6, 1),
        "link_mbit": round(rate * 8 / 1e6, 1),
        "free_s": round(base, 3),
        "pushed_s": round(with_push, 3),
        "after_s": round(statistics.median(after), 3),
        "hidden": round(1 - (with_push - base) / transfer, 3),
        "after_prefill_s": round(with_push - base, 3),
        "mooncake_after_prefill_s": round(statistics.median(theirs), 3) if theirs else None,
        "repetitions": repetitions,
        "spread": {
            "free": [round(t, 3) for t, _ in free],
            "pushed": [round(t, 3) for t in pushed],
            "after": [round(t, 3) for t in after],
            "mooncake": [round(t, 3) for t in theirs],
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if why := netns.missing():
        print(f"bench_push: {why}", file=sys.stderr)
        return 2
    folder = Path(f"/tmp/pdb{os.getpid()}")
    folder.mkdir()
    try:
        with hosts_launch.hosts("a", "b") as net:
            where = {name: host.address for name, host in net.hosts.items()}
            spread = Spread(net, TOPOLOGY.format(pid=os.getpid(), length=args.tokens + 64, **where), folder)
            try:
                spread.launch("a", "b")
                spread.wait_ready("a", "b")
                result = measure(Bench(spread, args.tokens, args.seed), args.repetitions)
            finally:
                spread.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['tokens']} tokens, {result['megabytes']} MB, link {result['link_mbit']} Mbit/s: prefill {result['prefill_s']} s, "
            f"transfer {result['transfer_s']} s; first token: free {result['free_s']} s, pushed {result['pushed_s']} s, "
            f"fetched afterwards {result['after_s']} s; hidden {100 * result['hidden']:.0f} % (aim 80 %)"
        )
        if (theirs := result["mooncake_after_prefill_s"]) is not None:
            print(
                f"from the end of the prefill on: ours {result['after_prefill_s']} s, Mooncake's transfer engine {theirs} s"
            )
    return 0 if result["hidden"] >= 0.8 else 1


if __name__ == "__main__":
    sys.exit(main())

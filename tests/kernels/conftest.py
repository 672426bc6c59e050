"""A GPU that is none: kernels on ordinary threads, and a driver under the host part."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from pdserve.kernels import build, gpu

HERE = Path(__file__).parent / "emulated"


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    compiler = build.compiler()
    assert compiler, "a C++ compiler"
    out = tmp_path_factory.mktemp("emulated") / "lib.so"
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-pthread", "-D__CUDACC__", f"-I{HERE}", f"-I{build.SOURCES}"]
    sources = [str(HERE / "main.cpp"), str(HERE / "driver.cpp")]
    subprocess.run([compiler, *flags, *sources, "-o", str(out)], check=True, timeout=120)
    return ctypes.CDLL(str(out))


@pytest.fixture
def without_kernels(library, tmp_path_factory, monkeypatch):
    """kernels.gpu as it is where the run-time compiler made the kernels; `library` is the driver."""
    code = tmp_path_factory.mktemp("code") / "sm_90.cubin"
    code.write_bytes(b"emulated\0")
    host = build.lanes_library(tmp_path_factory.getbasetemp() / "lanes")
    monkeypatch.setattr(build, "gpu_library", lambda root, arch: build.GpuBuild(host, code, "emulated"))
    monkeypatch.setattr(gpu, "DRIVER", library._name)
    before = library.emulated_kept()
    yield code
    assert library.emulated_kept() == before  # everything was given back

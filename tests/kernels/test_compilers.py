"""The GPU sources compile for what they promise to run on, where the compiler is. Nothing is run here: there is no device."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pdserve.kernels import build

EXPORTED = ("pd_gpu_open", "pd_gpu_save", "pd_gpu_load", "pd_gpu_submit", "pd_gpu_register", "pd_gpu_settle")
NVIDIA = ["sm_80", "sm_90", "sm_100"]


def has_all(library: Path) -> None:
    made = ctypes.CDLL(str(library))
    for name in EXPORTED:
        assert getattr(made, name)


@pytest.fixture(scope="module")
def being_made(tmp_path_factory):
    """Architecture -> its folder and its library to come: two compilers at a time, each takes seconds of one core."""
    archs = [arch for arch in (*NVIDIA, "gfx90a") if build.gpu_compiler(arch) is not None]
    folders = {arch: tmp_path_factory.mktemp(arch) for arch in archs}
    with ThreadPoolExecutor(2) as pool:
        yield {arch: (folder, pool.submit(build.gpu_library, folder, arch)) for arch, folder in folders.items()}


@pytest.mark.parametrize("arch", NVIDIA)
def test_nvidia(arch, being_made):
    if arch not in being_made:
        pytest.skip("no nvcc (CUDA toolkit)")
    folder, coming = being_made[arch]
    made = coming.result(280)
    has_all(made)
    assert build.gpu_library(folder, arch) == made  # kept, not made again


def test_amd_gfx90a(being_made):
    if "gfx90a" not in being_made:
        pytest.skip("no hipcc (Debian: hipcc libamdhip64-dev rocm-device-libs)")
    has_all(being_made["gfx90a"][1].result(280))


# What Debian's device library lacks for gfx942: the number by which its code asks for the instruction set.
ISA_942 = """
target triple = "amdgcn-amd-amdhsa"
@__oclc_ISA_version = linkonce_odr hidden local_unnamed_addr addrspace(4) constant i32 9402, align 4
"""


def test_amd_gfx942_as_far_as_a_distribution_without_it_can_tell(tmp_path):
    """A build check with a stand-in for one file of the device library, not a supported toolchain."""
    bitcode = Path("/usr/lib/x86_64-linux-gnu/amdgcn/bitcode")
    tools = [shutil.which(name) for name in ("clang++-19", "llvm-as-19", "ld.lld-19", "clang-offload-bundler-19")]
    if not all(tools) or not bitcode.is_dir():
        pytest.skip("no clang 19 (Debian: clang-19 lld-19 clang-tools-19 llvm-19) or no rocm-device-libs")
    shutil.copytree(bitcode, tmp_path / "bitcode")
    (tmp_path / "isa.ll").write_text(ISA_942)
    assemble = [str(tools[1]), str(tmp_path / "isa.ll"), "-o", str(tmp_path / "bitcode/oclc_isa_version_942.bc")]
    subprocess.run(assemble, check=True, timeout=60)
    flags = [flag.format(arch="gfx942") for flag in build.GPU_FLAGS["hipcc"]]
    paths = ["--rocm-path=/usr", f"--rocm-device-lib-path={tmp_path / 'bitcode'}"]
    command = [str(tools[0]), *flags, *paths, str(build.SOURCES / "blocks.cu"), "-o", str(tmp_path / "lib.so"), "-lamdhip64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    has_all(tmp_path / "lib.so")


def test_without_a_compiler_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "gpu_compiler", lambda arch: None)
    with pytest.raises(build.BuildError, match="no nvcc found to compile for sm_90"):
        build.gpu_library(tmp_path, "sm_90")

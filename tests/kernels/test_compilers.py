"""The GPU sources compile for what they promise to run on, where the compiler is. Nothing is run here: there is no device."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pdserve.kernels import build, gpu, nvrtc

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
    assert made.code is None
    has_all(made.library)
    assert build.gpu_library(folder, arch) == made  # kept, not made again


def test_amd_gfx90a(being_made):
    if "gfx90a" not in being_made:
        pytest.skip("no hipcc (Debian: hipcc libamdhip64-dev rocm-device-libs)")
    has_all(being_made["gfx90a"][1].result(280).library)


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
    command = [str(tools[0]), *flags, *paths, str(build.SOURCES / "lanes.cpp"), "-o", str(tmp_path / "lib.so"), "-lamdhip64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    has_all(tmp_path / "lib.so")


needs_nvrtc = pytest.mark.skipif(not nvrtc.libraries(), reason="no libnvrtc.so (PyPI: nvidia-cuda-nvrtc)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of what NVRTC makes: the host part is the same for all architectures."""
    return tmp_path_factory.mktemp("nvrtc")


@needs_nvrtc
@pytest.mark.parametrize("arch", NVIDIA)
def test_nvrtc_makes_every_kernel_that_is_launched(arch, folder, monkeypatch):
    monkeypatch.setenv("PDSERVE_KERNELS", "nvrtc")
    made = build.gpu_library(folder, arch)
    assert "NVRTC" in made.how
    has_all(made.library)
    kinds = "plain", "wide", *(f"{of}_{to}" for of in ("bf16", "fp16", "fp32") for to in ("fp8", "int8"))
    launched = {f"pd_{way}_{kind}" for way in ("gather", "scatter") for kind in kinds}
    there, flags = cubin(made.code.read_bytes())
    assert there == launched
    assert all(name.encode() in made.library.read_bytes() for name in launched)
    assert int(arch[3:]) in (flags >> 8 & 0xFF, flags & 0xFF)  # where newer and older cubins say what they are for
    assert build.gpu_library(folder, arch) == made
    assert made.code.stat().st_mtime_ns == build.gpu_library(folder, arch).code.stat().st_mtime_ns


def cubin(image: bytes) -> tuple[set[str], int]:
    """(functions that other code can ask for, flags) of a 64-bit ELF file."""
    assert image[:5] == b"\x7fELF\x02"
    machine, flags = struct.unpack_from("<H", image, 18)[0], struct.unpack_from("<I", image, 48)[0]
    assert machine == 190  # EM_CUDA
    at, size, count = struct.unpack_from("<Q", image, 40)[0], *struct.unpack_from("<HH", image, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", image, at + i * size) for i in range(count)]
    names = set()
    for _, kind, _, _, offset, length, link, _, _, entry in sections:
        if kind != 2:  # the table of symbols
            continue
        for symbol in range(offset, offset + length, entry):
            name, info, _, section = struct.unpack_from("<IBBH", image, symbol)
            if info & 0xF == 2 and info >> 4 == 1 and section:  # a function, global, defined here
                start = sections[link][4] + name
                names.add(image[start : image.index(b"\0", start)].decode())
    return names, flags


@needs_nvrtc
def test_what_nvrtc_refuses_comes_with_its_log(tmp_path, monkeypatch):
    source = tmp_path / "wrong.cu"
    source.write_text('extern "C" __global__ void f() { there_is_no_such_thing(); }')
    with pytest.raises(nvrtc.NvrtcError, match=r"(?s)nvrtcCompileProgram.*there_is_no_such_thing"):
        nvrtc.Nvrtc(nvrtc.libraries()[0]).cubin(source, ["--gpu-architecture=sm_90"])
    monkeypatch.setenv("PDSERVE_KERNELS", "nvrtc")
    with pytest.raises(build.BuildError, match=r"(?s)PDSERVE_KERNELS=nvrtc; for sm_20, .*invalid value"):
        build.gpu_library(tmp_path / "build", "sm_20")


def test_what_is_no_nvrtc_is_named(tmp_path):
    with pytest.raises(nvrtc.NvrtcError, match=r"libnvrtc\.so\.13 does not load"):
        nvrtc.Nvrtc(tmp_path / "libnvrtc.so.13")
    with pytest.raises(nvrtc.NvrtcError, match=r"libc\.so\.6 does not load.*nvrtcGetErrorString"):
        nvrtc.Nvrtc(Path("libc.so.6"))


def test_the_newest_nvrtc_that_the_driver_can_load_comes_first(tmp_path, monkeypatch):
    for name in ("libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so.11.8.89", "libnvrtc-builtins.so.13.0", "libnvrtc.alt.so.12"):
        (tmp_path / name).touch()
    monkeypatch.setattr(nvrtc, "_folders", lambda: [tmp_path])

    def order(driver):
        monkeypatch.setattr(nvrtc, "driver_major", lambda: driver)
        return [path.name.removeprefix("libnvrtc.so.") for path in nvrtc.libraries()]

    assert order(None) == order(13) == ["13", "12", "11.8.89"]
    assert order(12) == ["12", "11.8.89", "13"]


def test_which_way_is_taken(tmp_path, monkeypatch):
    asked = []

    def refuses(way):
        def by(root, arch):
            asked.append(way)
            raise build.BuildError(f"{way} cannot")

        return by

    monkeypatch.setattr(build, "_by_toolkit", refuses("toolkit"))
    monkeypatch.setattr(build, "_by_nvrtc", refuses("nvrtc"))
    for arch, wanted, ways in (
        ("sm_90", "", ["toolkit", "nvrtc"]), ("sm_90", "nvcc", ["toolkit"]), ("sm_90", "nvrtc", ["nvrtc"]), ("sm_90", "torch", []),
        ("sm_90", "hipcc", []), ("gfx90a", "", ["toolkit"]), ("gfx90a", "nvrtc", []), ("gfx90a", "hipcc", ["toolkit"]),
    ):  # fmt: skip
        asked.clear()
        monkeypatch.setenv("PDSERVE_KERNELS", wanted)
        with pytest.raises(build.BuildError) as refused:
            build.gpu_library(tmp_path, arch)
        assert asked == ways
        assert all(f"{way} cannot" in str(refused.value) for way in ways)
        assert wanted in str(refused.value)
    monkeypatch.setenv("PDSERVE_KERNELS", "cuda")
    with pytest.raises(build.BuildError, match="nvcc, hipcc, nvrtc, torch"):
        gpu.library("sm_90")


def test_without_a_compiler_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.delenv("PDSERVE_KERNELS", raising=False)
    monkeypatch.setattr(build, "gpu_compiler", lambda arch: None)
    monkeypatch.setattr(nvrtc, "libraries", lambda: [])
    with pytest.raises(build.BuildError, match=r"no nvcc found to compile for sm_90; no libnvrtc\.so found"):
        build.gpu_library(tmp_path, "sm_90")
    monkeypatch.setattr(build, "compiler", lambda: None)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler found"):
        build.lanes_library(tmp_path)

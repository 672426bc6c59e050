"""CUDA's run-time compiler, NVRTC: a library without headers and tools that torch brings along. Kernels' source -> a cubin.

Nothing here needs a GPU; which architecture is compiled for is the caller's word.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from pathlib import Path

#: what a toolkit or an image calls its folders
_VARIABLES, _USUAL = ("CUDA_HOME", "CUDA_PATH"), "/usr/local/cuda"
DRIVER = "libcuda.so.1"
_OK = 0


class NvrtcError(Exception):
    """The library does not load, or it refused the source; the message has its log."""


def libraries() -> list[Path]:
    """Every libnvrtc.so.N that is installed, the one to use first: not newer than the driver, then the newest."""
    found = {p.resolve(): p for folder in _folders() for p in sorted(folder.glob("libnvrtc.so.*")) if _major(p)}
    limit = driver_major() or 1000  # no driver, no device: then it is only a matter of compiling
    return sorted(found.values(), key=lambda p: (_major(p) > limit, -_major(p)))


def _folders() -> list[Path]:
    """Packages nvidia-cuda-nvrtc (nvidia/cu13/lib) and nvidia-cuda-nvrtc-cu12 (nvidia/cuda_nvrtc/lib), then a toolkit's folders."""
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(p) for p in (spec.submodule_search_locations or []) if spec] if spec else []
    roots = [Path(r) for r in (*(os.environ.get(v) for v in _VARIABLES), _USUAL) if r]
    system = [Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib/aarch64-linux-gnu"), Path("/usr/lib64")]
    return [*(f for p in packages for f in sorted(p.glob("*/lib"))), *(r / "lib64" for r in roots), *system]


def _major(path: Path) -> int:
    """Of libnvrtc.so.13 or libnvrtc.so.13.0.88; 0 for another library's name."""
    found = re.fullmatch(r"libnvrtc\.so\.(\d+)(\.\d+)*", path.name)
    return int(found[1]) if found else 0


def driver_major() -> int | None:
    """The CUDA version of the driver; None where there is no driver. A driver does not load what a later one's compiler made."""
    version = ctypes.c_int()
    try:
        code = ctypes.CDLL(DRIVER).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return version.value // 1000 if code == _OK else None


class Nvrtc:
    """One library, loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._lib = ctypes.CDLL(str(path))
            self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
            major, minor = ctypes.c_int(), ctypes.c_int()
            self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        except (OSError, AttributeError) as e:
            raise NvrtcError(f"{path} does not load: {e}") from e
        self.version = f"{major.value}.{minor.value}"

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._lib, name)(*arguments)
        if code != _OK:
            raise NvrtcError(f"{name}: {self._lib.nvrtcGetErrorString(code).decode()} ({self.path}, version {self.version})")

    def cubin(self, source: Path, options: list[str]) -> bytes:
        """Compiles; includes are found by -I in the options. Raises NvrtcError with the compiler's log."""
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
        try:
            given = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
            try:
                self._call("nvrtcCompileProgram", program, len(options), given)
            except NvrtcError as e:
                raise NvrtcError(f"{e}: {self._read('nvrtcGetProgramLog', program).decode(errors='replace').strip()}") from e
            return self._read("nvrtcGetCUBIN", program)
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, name: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{name}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(name, program, text)
        return text.raw.rstrip(b"\0") if name.endswith("Log") else text.raw

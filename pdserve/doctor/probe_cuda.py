"""Run as a child: what the CUDA driver says, as one line of JSON. Only ctypes: a broken driver may crash who asks."""

from __future__ import annotations

import ctypes
import json
from typing import Any

_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76  # CUdevice_attribute


def look() -> dict[str, Any]:
    try:
        lib = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {"library": False, "error": str(error), "driver": None, "devices": []}
    code = lib.cuInit(0)
    if code:
        name = ctypes.c_char_p()
        lib.cuGetErrorName(code, ctypes.byref(name))
        return {"library": True, "error": (name.value or b"?").decode(), "driver": None, "devices": []}
    version, count = ctypes.c_int(), ctypes.c_int()
    lib.cuDriverGetVersion(ctypes.byref(version))
    lib.cuDeviceGetCount(ctypes.byref(count))
    return {
        "library": True,
        "error": "",
        "driver": f"{version.value // 1000}.{version.value % 1000 // 10}",
        "devices": [_device(lib, n) for n in range(count.value)],
    }


def _device(lib: ctypes.CDLL, number: int) -> dict[str, Any]:
    handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, size = ctypes.create_string_buffer(128), ctypes.c_size_t()
    lib.cuDeviceGet(ctypes.byref(handle), number)
    lib.cuDeviceGetName(name, len(name), handle)
    lib.cuDeviceTotalMem_v2(ctypes.byref(size), handle)
    lib.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_MAJOR, handle)
    lib.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_MINOR, handle)
    return {"name": name.value.decode(), "bytes": size.value, "arch": f"sm_{major.value}{minor.value}"}


if __name__ == "__main__":
    print(json.dumps(look()))

"""The way to the driver, over a library that answers as an H200's did (docs/measurements.md): no GPU is needed for it.

What this does not show is the driver's own behaviour; it shows that its functions are called as its headers declare them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pdserve.doctor import gpu

COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler here (cc or gcc)")
#: the signatures of cuda.h, the exported name of cuDeviceTotalMem included
SOURCE = """
#include <stddef.h>
#include <string.h>
typedef int CUresult; typedef int CUdevice;
CUresult cuInit(unsigned int flags) { return flags ? 1 : CODE; }
CUresult cuGetErrorName(CUresult error, const char **name) { *name = error == 999 ? "CUDA_ERROR_UNKNOWN" : 0; return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = 100 + ordinal; return ordinal < COUNT ? 0 : 101; }
CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    if (device < 100) return 101;
    strncpy(name, "NVIDIA H200", length); return 0;
}
CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    if (device < 100) return 101;
    *bytes = (size_t)143771 << 20; return 0;
}
CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    if (device < 100) return 101;
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : -1; return 0;
}
"""


def probed(folder: Path, count: int = 1, code: int = 0) -> dict[str, Any]:
    (folder / "cuda.c").write_text(SOURCE)
    assert COMPILER is not None
    words = ["-shared", "-fPIC", f"-DCOUNT={count}", f"-DCODE={code}", "-o", "libcuda.so.1", "cuda.c"]
    subprocess.run([COMPILER, *words], cwd=folder, check=True, timeout=60)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    command = [sys.executable, "-P", "-m", "pdserve.doctor.probe_cuda"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_an_h200_says(tmp_path: Path) -> None:
    found = probed(tmp_path, count=2)
    device = {"name": "NVIDIA H200", "bytes": 143771 << 20, "arch": "sm_90"}
    assert found == {"library": True, "error": "", "driver": "13.0", "devices": [device, device]}
    finding = gpu.judge(gpu.Facts(2, found, driver="580.159.04"), 2)
    assert (finding.status, finding.found) == ("ok", "2 x NVIDIA H200 (140 GiB, sm_90), driver 580.159.04, CUDA 13.0")


def test_a_driver_that_does_not_serve(tmp_path: Path) -> None:
    found = probed(tmp_path, code=999)
    assert found == {"library": True, "error": "CUDA_ERROR_UNKNOWN", "driver": None, "devices": []}
    finding = gpu.judge(gpu.Facts(1, found), 1)
    assert (finding.status, "CUDA_ERROR_UNKNOWN" in finding.found) == ("fail", True)


def test_an_error_without_a_name_and_no_devices(tmp_path: Path) -> None:
    assert probed(tmp_path, code=7)["error"] == "?"
    found = probed(tmp_path, count=0)
    assert (found["error"], found["devices"]) == ("", [])
    finding = gpu.judge(gpu.Facts(1, found), None)
    assert finding.status == "fail"
    assert "no devices" in finding.found

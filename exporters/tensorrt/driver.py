"""The NVIDIA GPU of this machine, asked of its driver. Run as a script, by `local_gpu`: a broken
driver may crash the process that loads it."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from dataclasses import dataclass

ASK_S = 60.0
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, of the CUDA driver API


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first GPU: its name, and its compute capability as compilers name it, "sm86"."""

    name: str
    sm: str


def local_gpu() -> Gpu | None:
    """The GPU that a builder would tune for; None without a driver or a GPU."""
    try:
        asked = subprocess.run(
            [sys.executable, __file__],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=ASK_S,
        )
    except subprocess.SubprocessError:
        return None
    told = json.loads(asked.stdout)
    return None if told is None else Gpu(**told)


def _ask() -> dict[str, str] | None:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, number = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name, parts = ctypes.create_string_buffer(256), []
    cuda.cuDeviceGetName(name, len(name), device)
    for attribute in (MAJOR, MINOR):
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        parts.append(str(number.value))
    return {"name": name.value.decode(), "sm": "sm" + "".join(parts)}


if __name__ == "__main__":
    print(json.dumps(_ask()))

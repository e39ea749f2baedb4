"""Compiles CUDA C++ at first use, by the NVRTC that CUDA builds of torch carry; without a GPU, for emulated.hpp."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..canonical import EXP2_COEFFICIENTS, ROUND_MAGIC
from ..certified import bounds
from . import emulator

log = logging.getLogger(__name__)
HARDWARE, COMMON = (Path(__file__).with_name(name) for name in ("hardware.cuh", "common.cuh"))
#: as ELEM in common.cuh
ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def literal(x: float) -> str:
    """``x`` as a float32 literal of C++, exactly."""
    return f"{float.hex(x)}f"


def defines(**constants: int) -> list[str]:
    """Macros of one variant, as options of the compiler."""
    fixed = {f"C{7 - i}": literal(c) for i, c in enumerate(EXP2_COEFFICIENTS)}
    fixed |= {"MAGIC": literal(ROUND_MAGIC), "UNITS": literal(bounds.UNITS)}
    fixed |= {"SMALLEST": f"{bounds.SMALLEST}f", "LARGEST": f"{bounds.LARGEST}f"}
    fixed |= {name.upper(): str(x) for name, x in constants.items()}
    return [f"-D{name}={x}" for name, x in fixed.items()]


@lru_cache(maxsize=256)
def compiled(file: Path, name: str, dynamic: int, device: torch.device, **constants: int) -> Any:
    """Kernel ``name`` of ``file``, called as ``kernel(grid, block, args, shared_mem)``, that at most ``dynamic``.

    None, with the reason logged, if it cannot be compiled.
    """
    try:
        if device.type == "cpu":
            return emulator.compiled(COMMON.read_text("utf-8") + file.read_text("utf-8"), name, defines(**constants))
        text = "".join(part.read_text("utf-8") for part in (HARDWARE, COMMON, file))
        # 177: a constant that the kernel at hand does not use.
        options = ["--std=c++17", "-default-device", "-diag-suppress=177", *defines(**constants)]
        with torch.cuda.device(device):
            kernel = torch.cuda._compile_kernel(text, name, nvcc_options=options)
            kernel.set_shared_memory_config(dynamic)
        return kernel
    except (AttributeError, OSError, RuntimeError) as error:
        log.warning("%s cannot be used, the slower Triton kernels are: %s", file.name, error)
        return None

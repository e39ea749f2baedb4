"""Compiles CUDA C++ at first use, by the NVRTC that CUDA builds of torch carry; without a GPU, for emulated.hpp."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..arithmetic import fast_scores
from ..arithmetic.reference import EXP2_COEFFICIENTS, ROUND_MAGIC
from . import emulator
from .launching import launched_early

log = logging.getLogger(__name__)
HARDWARE = Path(__file__).with_name("hardware.cuh")
CANONICAL = Path(__file__).parent.parent / "arithmetic" / "canonical.cuh"
#: as ELEM in canonical.cuh
ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: bytes of shared memory that a program may have
SHARED_LIMIT = 227 * 1024


#: loads between two batches or two heads: a 32-bit number that the kernels widen before they multiply it
MOST_STRIDE = 1 << 31
#: and between two tokens: the kernels turn it into bytes, of 32 bits too
MOST_TOKEN_STRIDE = 1 << 27


def runs_on(device: torch.device, capability: tuple[int, int]) -> bool:
    """Whether kernels that need this compute capability run there; on a CPU they are emulated."""
    if device.type != "cuda":
        return device.type == "cpu"
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= capability


def in_16_bytes(x: torch.Tensor) -> int:
    """Numbers of the kernels' dtype in one load; E in canonical.cuh."""
    return 4 if x.dtype == torch.float32 else 8


def readable(each: int, dims: tuple[int, ...], *tensors: torch.Tensor | None) -> bool:
    """Whether 2 to 32 lanes share a row of every one of ``dims`` numbers, and all tensors are read by whole loads.

    It depends on where a tensor lies, so it is asked before every launch, not once when a kernel is compiled.
    """
    if not all(dim & (dim - 1) == 0 and 2 * each <= dim <= 32 * each for dim in dims):
        return False
    return all(_by_whole_loads(x, each) for x in tensors if x is not None and x.numel())


def _by_whole_loads(x: torch.Tensor, each: int) -> bool:
    """Whether every row of ``x [B, H, N, D]`` is in one piece, begins at 16 bytes, and is found by 32-bit strides."""
    if x.stride(3) != 1 or x.data_ptr() % 16:
        return False
    most = (MOST_STRIDE, MOST_STRIDE, MOST_TOKEN_STRIDE)
    # The stride of a dimension of one is never used.
    return all(
        size == 1 or (stride * x.element_size() % 16 == 0 and stride // each < limit)
        for size, stride, limit in zip(x.shape, x.stride(), most, strict=False)
    )


def units(x: torch.Tensor, each: int) -> list[int]:
    """Strides of batches, heads and tokens in loads of ``each`` numbers, as the kernels take them.

    That of tokens does not depend on how many there are, so that a captured launch serves a view that grows.
    """
    batches, heads, tokens = (stride // each for stride in x.stride()[:3])
    tokens = tokens if tokens < MOST_TOKEN_STRIDE else 0
    return [batches if x.shape[0] > 1 else 0, heads if x.shape[1] > 1 else 0, tokens]


def start_of(x: torch.Tensor, none: torch.Tensor) -> torch.Tensor:
    """Where ``x`` begins, for a kernel: a view without tokens has no address of its own, but will grow.

    ``none`` stands in for what has no memory at all.
    """
    if x.numel():
        return x
    items = x.untyped_storage().nbytes() // x.element_size()
    return x.as_strided((1,), (1,)) if x.storage_offset() < items else none


def literal(x: float) -> str:
    """``x`` as a float32 literal of C++, exactly."""
    return f"{float.hex(x)}f"


def defines(**constants: int) -> list[str]:
    """Macros of one variant, as options of the compiler."""
    fixed = {f"C{7 - i}": literal(c) for i, c in enumerate(EXP2_COEFFICIENTS)}
    fixed |= {"MAGIC": literal(ROUND_MAGIC), "UNITS": literal(fast_scores.UNITS)}
    fixed |= {
        name: f"{getattr(fast_scores, name)}f" for name in ("SMALLEST", "LARGEST", "SHORTEST", "LEAST_CODE_SCALE")
    }
    fixed |= {name.upper(): str(x) for name, x in constants.items()}
    return [f"-D{name}={x}" for name, x in fixed.items()]


@lru_cache(maxsize=256)
def compiled(
    file: Path,
    name: str,
    dynamic: int,
    device: torch.device,
    before: tuple[Path, ...] = (),
    early: bool = False,
    **constants: int,
) -> Any:
    """Kernel ``name`` of ``file``, called as ``kernel(grid, block, args, shared_mem)``, that at most ``dynamic``.

    ``before`` are files that it shares with others; ``early``: it awaits the kernel before it itself. None, with the
    reason logged, if it cannot be compiled.
    """
    try:
        text = "".join(part.read_text("utf-8") for part in (CANONICAL, *before, file))
        if device.type == "cpu":
            return emulator.compiled(text, name, defines(**constants))
        text = HARDWARE.read_text("utf-8") + text
        # 177: a constant that the kernel at hand does not use.
        options = ["--std=c++17", "-default-device", "-diag-suppress=177", *defines(**constants)]
        with torch.cuda.device(device):
            kernel = torch.cuda._compile_kernel(text, name, nvcc_options=options)
            kernel.set_shared_memory_config(dynamic)
        return launched_early(kernel) if early else kernel
    except (AttributeError, OSError, RuntimeError) as error:
        log.warning("%s cannot be used, slower kernels are: %s", file.name, error)
        return None

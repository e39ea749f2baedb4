"""The rules in Triton (``qaxis.arithmetic`` numbers them): device functions that every kernel shares.

The only module that imports Triton; the others take ``triton`` and ``tl`` from here. Compiled on a GPU, or run by
Triton's interpreter on a CPU, a kernel of these returns the bits of the PyTorch reference. Blocks are powers of two,
so that a tree within blocks followed by a tree over blocks is the same tree whatever the block size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any

import torch
import triton
import triton.language as tl

from .fast_scores import LARGEST, SHORTEST, SMALLEST, UNITS
from .reference import EXP2_COEFFICIENTS, ROUND_MAGIC

__all__ = [
    "INTERPRETED", "check_device", "exp2", "exp2_of", "jit", "log2", "row_and_block", "score_of", "tl", "tree_sum",
    "triton", "units_per_score", "widen",
]  # fmt: skip

#: whether kernels run in Triton's interpreter, on a CPU; Triton reads TRITON_INTERPRET when a kernel is defined
INTERPRETED = bool(triton.knobs.runtime.interpret)
#: Triton's own functions (tl.sum and others) were defined otherwise: before TRITON_INTERPRET was set, or taken back
LOADED_TOO_EARLY = INTERPRETED == isinstance(tl.sum, triton.JITFunction)
#: Triton's interpreter changes its language's module while a kernel runs: one at a time
_INTERPRETER = RLock()


def jit(function: Callable[..., Any], any_integer: Sequence[str] = ()) -> Any:
    """``triton.jit``; interpreted kernels run one at a time, whichever threads launch them.

    Args:
        any_integer: arguments whose value is no reason to compile the kernel once more, for 1 or multiples of 16.

    Raises:
        RuntimeError: if TRITON_INTERPRET was changed since the first kernel was defined.
    """
    if bool(triton.knobs.runtime.interpret) != INTERPRETED:
        raise RuntimeError(
            "TRITON_INTERPRET was changed after qaxis's first kernels were loaded: set it in the environment before "
            "Python starts, and leave it"
        )
    made = triton.jit(function, do_not_specialize=list(any_integer))
    if INTERPRETED:

        def run(*args: Any, **kwargs: Any) -> Any:
            with _INTERPRETER:
                return type(made).run(made, *args, **kwargs)

        made.run = run
    return made


_C7, _C6, _C5, _C4, _C3, _C2, _C1, _C0 = (tl.constexpr(c) for c in EXP2_COEFFICIENTS)
_MAGIC = tl.constexpr(ROUND_MAGIC)
_UNITS, _SMALLEST, _LARGEST = tl.constexpr(UNITS), tl.constexpr(SMALLEST), tl.constexpr(LARGEST)
_SHORTEST = tl.constexpr(SHORTEST)


@jit
def tree_sum(x, ROWS: tl.constexpr, N: tl.constexpr, LOG_N: tl.constexpr):
    """Balanced adjacent-pair tree over the last dimension, [ROWS, N] -> [ROWS] (rule 2).

    Pairs are reduced where they lie, in a lane or in two: split and joined they went through shared memory and spilled.
    """
    for level in tl.static_range(LOG_N):
        x = tl.sum(tl.reshape(x, (ROWS, N >> (level + 1), 2)), 2)
    return tl.reshape(x, (ROWS,)) + 0.0


@jit
def widen(x):
    """To float32, exactly (rule 1). bfloat16 by its bits: Triton's interpreter converts its subnormals wrongly."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@jit
def exp2(t):
    """2^t by separate multiply and add (rule 3); launch with enable_fp_fusion=False."""
    t = tl.minimum(tl.maximum(t, -200.0), 200.0)
    rounded = (t + _MAGIC) - _MAGIC
    f = t - rounded
    p = f * _C7 + _C6
    p = p * f + _C5
    p = p * f + _C4
    p = p * f + _C3
    p = p * f + _C2
    p = p * f + _C1
    p = p * f + _C0
    n = rounded.to(tl.int32)
    half = n >> 1
    p = p * ((half + 127) << 23).to(tl.float32, bitcast=True)
    return p * ((n - half + 127) << 23).to(tl.float32, bitcast=True)


@jit
def score_of(word):
    """The bits of a score from its integer in the order of the scores, and back (rule 4; a canonical score is never
    -0.0)."""
    return word ^ ((word >> 31) & 2147483647)


@jit
def units_per_score(norm_q, norm_k):
    """Integers of the 16-bit score in one unit of score; 0 where the range is not usable: then all keys tie."""
    largest = norm_q * norm_k * 1.001
    usable = (largest > _SMALLEST) & (largest < _LARGEST) & (norm_q > _SHORTEST)
    return tl.where(usable, _UNITS / tl.where(usable, largest, 1.0), 0.0)


@jit
def row_and_block(blocks):
    """(row, block) of this program, of a grid of rows * blocks programs.

    The grid has one dimension, as its second ends at 65535.
    """
    place = tl.program_id(0).to(tl.int64)
    return place // blocks, (place % blocks).to(tl.int32)


@jit
def _exp2_kernel(t_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, exp2(tl.load(t_ptr + i, mask=i < n, other=0.0)), mask=i < n)


def exp2_of(t: torch.Tensor) -> torch.Tensor:
    """The kernels' exponential of every element of a contiguous float32 tensor, for comparison with the reference's."""
    check_device("t", t)
    out = torch.full_like(t, torch.nan)
    _exp2_kernel[(triton.cdiv(t.numel(), 1024),)](t, out, t.numel(), BLOCK=1024, enable_fp_fusion=False)
    return out


def log2(n: int) -> int:
    """Exponent of a power of two."""
    return n.bit_length() - 1


def check_device(name: str, x: torch.Tensor, *, calls_library: bool = False) -> None:
    """Check that kernels run where ``x`` is; ``calls_library``: kernels that call Triton's own functions.

    Raises:
        ValueError: for a tensor on a GPU while kernels are interpreted, or the reverse.
        RuntimeError: if Triton's own functions were defined before TRITON_INTERPRET was set, or taken back.
    """
    if x.is_cuda == INTERPRETED:
        allowed = (
            "a tensor on a CPU, as TRITON_INTERPRET is set; unset it before Python starts to run kernels on a GPU"
            if INTERPRETED
            else "a tensor on a GPU, as TRITON_INTERPRET is off; set TRITON_INTERPRET=1 before Python starts to run "
            "kernels on a CPU, or use backend='reference' where there is one"
        )
        raise ValueError(f"{name}.device={str(x.device)!r}: allowed is {allowed}")
    if calls_library and LOADED_TOO_EARLY:
        before = "to compile kernels" if INTERPRETED else "for its interpreter"
        raise RuntimeError(
            f"triton was imported {before}, and TRITON_INTERPRET changed after that: set it, or not, in the "
            "environment before Python starts, and leave it"
        )

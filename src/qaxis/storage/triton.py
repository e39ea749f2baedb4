"""Triton: the numbers of a tensor or of an 8-bit cache, read as they are stored, without a dequantised copy.

A code times its power of two is what dequantising gives, exactly, in float32 and in bfloat16: what reads through
:func:`load_numbers` returns the same bits for a cache as for its dequantised tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..arithmetic.reference import ROOT_HALF, next_power_of_two
from ..arithmetic.triton import jit, row_and_block, tl, triton, widen
from .side import Stored

_ROOT_HALF = tl.constexpr(ROOT_HALF)

#: tokens that a program of the dequantising kernel writes
TOKENS = 64


def readable(*sides: torch.Tensor | Stored) -> bool:
    """Whether kernels read these as they are: tensors, and 8 bits without rounding between float32 and the dtype."""
    return all(
        isinstance(s, torch.Tensor) or (s.grid.bits == 8 and s.dtype in (torch.float32, torch.bfloat16)) for s in sides
    )


@jit
def power_of_two(exponent):
    """2^e in float32 for int32 ``e`` in -126..127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@jit
def roots_of(exponent):
    """2^(-e/2), as the reference has it."""
    return power_of_two(-(exponent >> 1)) * tl.where((exponent & 1) != 0, _ROOT_HALF, 1.0)


@jit
def load_numbers(
    rows, scales, first, newest, position, d, mask, whole, sinks,
    rows_n, rows_d, scales_n, first_n, newest_n,
    STORED: tl.constexpr, SHARING: tl.constexpr, WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """Numbers at (position, d), int64 that broadcast against each other, as float32; pointers are those of one head.

    STORED: ``rows`` are codes up to token ``whole``, whose scales SHARING tokens share; the tokens before ``sinks``
    stand in ``first``, those from ``whole`` on in ``newest``. Otherwise ``rows`` are the numbers, the rest is unused.
    """
    if not STORED:
        return widen(tl.load(rows + position * rows_n + d * rows_d, mask=mask, other=0.0))
    else:
        in_first = mask & (position < sinks)
        in_newest = mask & (position >= whole) & (position >= sinks)
        coded = mask & (position >= sinks) & (position < whole)
        code = tl.load(rows + position * rows_n + d * rows_d, mask=coded, other=0)
        if PER_TOKEN:
            exponent = tl.load(scales + position * scales_n + d // WIDTH, mask=coded, other=0)
        else:
            exponent = tl.load(scales + (position // SHARING) * scales_n + d, mask=coded, other=0)
        x = code.to(tl.float32) * power_of_two(exponent.to(tl.int32))
        x = tl.where(in_first, widen(tl.load(first + position * first_n + d, mask=in_first, other=0.0)), x)
        late = newest + (position - whole) * newest_n + d
        return tl.where(in_newest, widen(tl.load(late, mask=in_newest, other=0.0)), x)


class SideArguments(NamedTuple):
    """What a kernel that reads through :func:`load_numbers` takes, in this order."""

    #: rows (numbers or codes), scales, first, newest
    pointers: tuple[torch.Tensor, ...]
    #: whole, sinks; then the strides of rows (batch, head, token, channel) and of scales, first and newest (no channel)
    sizes: tuple[int, ...]
    constants: dict[str, Any]


def side_arguments(x: torch.Tensor | Stored) -> SideArguments:
    """The arguments of a tensor ``[B, Hkv, N, D]`` of any strides, or of a :func:`readable` cache."""
    if isinstance(x, torch.Tensor):
        constants = {"STORED": False, "SHARING": 1, "WIDTH": 1, "PER_TOKEN": False}
        return SideArguments((x,) * 4, (0, 0, *x.stride(), *(0,) * 9), constants)
    newest = x.first if x.newest is None else x.newest
    # Growing buffers have their last dimension contiguous; a cache that was moved or permuted may not.
    parts = tuple(p if p.stride(-1) == 1 else p.contiguous() for p in (x.codes, x.scales, x.first, newest))
    strides = (*parts[0].stride(), *(s for p in parts[1:] for s in p.stride()[:3]))
    per_token = x.grid.per == "token"
    constants = {"STORED": True, "SHARING": x.grid.group_size, "WIDTH": x.width, "PER_TOKEN": per_token}
    return SideArguments(parts, (x.codes.shape[2], x.first.shape[2], *strides), constants)


@jit
def _dequantize_kernel(
    rows, scales, first, newest, out_ptr, heads, n, dim, blocks, whole, sinks,
    rows_b, rows_h, rows_n, rows_d, scales_b, scales_h, scales_n, first_b, first_h, first_n,
    newest_b, newest_h, newest_n,
    STORED: tl.constexpr, SHARING: tl.constexpr, WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens of one head as ordinary numbers."""
    head, block = row_and_block(blocks)
    b = head // heads
    g = head % heads
    position = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM).to(tl.int64)
    mask = (position < n)[:, None] & (d < dim)[None, :]
    x = load_numbers(
        rows + b * rows_b + g * rows_h, scales + b * scales_b + g * scales_h,
        first + b * first_b + g * first_h, newest + b * newest_b + g * newest_h,
        position[:, None], d[None, :], mask, whole, sinks, rows_n, rows_d, scales_n, first_n, newest_n,
        STORED, SHARING, WIDTH, PER_TOKEN,
    )  # fmt: skip
    out = out_ptr + (head * n + position[:, None]) * dim + d[None, :]
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=mask)


def dequantized(stored: Stored) -> torch.Tensor:
    """As :meth:`qaxis.storage.side.Stored.dequantized`, of a :func:`readable` cache, in one kernel."""
    batch, heads, n, dim = stored.shape
    out = torch.empty(stored.shape, dtype=stored.dtype, device=stored.codes.device)
    pointers, sizes, constants = side_arguments(stored)
    blocks = triton.cdiv(n, TOKENS)
    _dequantize_kernel[(blocks * batch * heads,)](
        *pointers, out, heads, n, dim, blocks, *sizes, **constants, BLOCK=TOKENS, DIM=next_power_of_two(dim),
    )  # fmt: skip
    return out

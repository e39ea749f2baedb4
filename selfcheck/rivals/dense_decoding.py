"""Dense decode steps to compare with: PyTorch's fused kernels, FlexAttention, a split-K flash decoding in Triton, and
those of packages that are installed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import dense_packages

#: of the largest number that is right: rounding to bfloat16, of weights and of what is added, is far below
TOLERANCE = 5e-2
BACKENDS = {
    "cuDNN SDPA": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention-2 SDPA": SDPBackend.FLASH_ATTENTION,
}


@triton.jit
def _split_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, n, last_ptr, room, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, GROWING: tl.constexpr,
):  # fmt: skip
    if GROWING:
        n = tl.load(last_ptr).to(tl.int32) + 1
    span = tl.cdiv(n, tl.num_programs(0))
    head = tl.program_id(1).to(tl.int64)
    r, d = tl.arange(0, ROWS), tl.arange(0, DIM)
    q = tl.load(q_ptr + (head * GROUP + r)[:, None] * DIM + d[None, :], mask=(r < GROUP)[:, None], other=0.0)
    top = tl.full((ROWS,), -1e30, tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, DIM), tl.float32)
    begin = tl.program_id(0).to(tl.int64) * span
    end = tl.minimum(begin + span, n)
    for offset in tl.range(0, span, BLOCK, num_stages=3):
        j = begin + offset + tl.arange(0, BLOCK)
        place = head * room * DIM + j[:, None] * DIM + d[None, :]
        k = tl.load(k_ptr + place, mask=(j < end)[:, None], other=0.0)
        s = tl.where((j < end)[None, :], tl.dot(q, tl.trans(k)) * scale, -1e30)
        now = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - now[:, None])
        shrink = tl.exp2(top - now)
        weight = weight * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + place, mask=(j < end)[:, None], other=0.0)
        total = total * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        top = now
    part = (head * tl.num_programs(0) + tl.program_id(0)) * ROWS + r
    tl.store(out_ptr + part[:, None] * DIM + d[None, :], total / weight[:, None])
    tl.store(lse_ptr + part, top + tl.log2(weight))


@triton.jit
def _merge_kernel(
    part_ptr, lse_ptr, out_ptr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, WIDE), tl.arange(0, DIM)
    part = (row // GROUP * SPLITS + tl.minimum(s, SPLITS - 1)) * ROWS + row % GROUP
    lse = tl.where(s < SPLITS, tl.load(lse_ptr + part), -1e30)
    weight = tl.exp2(lse - tl.max(lse, 0))
    x = tl.load(part_ptr + part[:, None] * DIM + d[None, :])
    out = tl.sum(x * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + row * DIM + d, out.to(out_ptr.dtype.element_ty))


def split_k(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, splits: int = 32, last: torch.Tensor | None = None
) -> torch.Tensor:
    """Flash decoding: the keys in ``splits`` stretches, partial softmaxes merged by their log-sum-exp.

    Args:
        q, k, v: ``[B, H, 1, D]``, ``[B, Hkv, N, D]``, contiguous.
        last: int64 ``[1]`` on the device: of the N places of k and v those up to this one are read.
    """
    batch, heads, _, dim = q.shape
    kv, n = k.shape[1], k.shape[2]
    part = torch.empty(batch * kv, splits, 16, dim, device=q.device)
    lse = torch.empty(batch * kv, splits, 16, device=q.device)
    scale = math.log2(math.e) / math.sqrt(dim)
    _split_kernel[(splits, batch * kv)](
        q, k, v, part, lse, n, last, n, scale, GROUP=heads // kv, ROWS=16, BLOCK=64, DIM=dim, GROWING=last is not None
    )
    return merge(q, part, lse)


def merge(q: torch.Tensor, part: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Output like ``q [B, H, 1, D]`` of partial softmaxes ``[B * Hkv, splits, 16, D]`` and their log-sum-exp."""
    batch, heads, _, dim = q.shape
    out, splits = torch.empty_like(q), part.shape[1]
    _merge_kernel[(batch * heads,)](
        part, lse, out, GROUP=batch * heads // part.shape[0], ROWS=16, SPLITS=splits,
        WIDE=triton.next_power_of_2(splits), DIM=dim,
    )  # fmt: skip
    return out


def off(out: torch.Tensor, right: torch.Tensor) -> float:
    """How far ``out`` is from what is right, of as many numbers, as a share of the largest of these."""
    far = (out.reshape(right.shape).float() - right.float()).abs().max() / right.float().abs().max()
    return math.inf if far.isnan() else float(far)


def variants(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, flex: bool = False) -> dict[str, Callable[[], object]]:
    """Every dense decode step that runs here; the heads of a group are laid out as queries where that is faster.

    Raises:
        AssertionError: for a step that is wrong; one of a package is left out.
    """
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    sdpa = torch.nn.functional.scaled_dot_product_attention
    expected = sdpa(grouped, k, v).reshape(q.shape)
    out: dict[str, Callable[[], object]] = {}

    def add(name: str, f: Callable[[], torch.Tensor], foreign: bool = False) -> None:
        try:
            error = off(f(), expected)
        except Exception as problem:  # a backend that this machine does not have
            print(f"{name}: does not run here ({dense_packages.first_line(problem)})")
            return
        if error <= TOLERANCE:
            out[name] = f
        elif foreign:
            print(f"{name}: is not timed, as it is off by {error:.2g} of the largest output")
        else:
            raise AssertionError(f"{name}: off by {error:.2g} of the largest output")

    for name, backend in BACKENDS.items():

        def fused(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return sdpa(grouped, k, v)

        def gqa(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, enable_gqa=True)

        add(name, fused)
        add(f"{name}, GQA", gqa)
    for splits in (16, 32, 64):
        add(f"Triton split-K, {splits}", partial(split_k, q, k, v, splits))
    for name, step in dense_packages.steps(q, k, v):
        add(name, step, foreign=True)
    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        add("FlexAttention", lambda: compiled(q, k, v, enable_gqa=True))
    return out


def captured(
    steps: dict[str, Callable[[], object]], capture: Callable[[Callable[[], object]], torch.cuda.CUDAGraph]
) -> dict[str, torch.cuda.CUDAGraph]:
    """Their graphs; a step that cannot be captured is left out.

    Raises:
        AssertionError: if none can.
    """
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, f in steps.items():
        try:
            graphs[name] = capture(f)
        except Exception as problem:
            print(f"{name}: cannot be captured ({dense_packages.first_line(problem)})")
    if not graphs:
        raise AssertionError("no dense step can be captured: there is nothing to compare with")
    return graphs

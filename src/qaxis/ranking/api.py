"""``topk``: the k best of every row, the same in every run, on every device, beside whatever else runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from ..validation import MOST_KEYS, check_memory, is_integer, require
from . import reference
from .cuda import CAPABILITY, selector_of

ORDERS, NANS, BACKENDS = ("position", "rank"), ("raise", "last"), ("auto", "reference", "cuda")


class TopK(NamedTuple):
    """Result of :func:`topk`, as that of :func:`torch.topk`."""

    #: float32 ``[..., k]``: the bits of the scores
    values: torch.Tensor
    #: int64 ``[..., k]``
    indices: torch.Tensor


def captured(device: torch.device) -> bool:
    """Whether what is launched there becomes part of a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@torch.compiler.disable(reason="kernels of our own; where a NaN stands is asked for on the host")
def topk(scores: torch.Tensor, k: int, *, order: str = "position", nan: str = "raise", backend: str = "auto") -> TopK:
    """The ``k`` highest of every row of ``scores``, of equal ones those at lower positions.

    The set is that of the first k of ``torch.sort(scores, dim=-1, descending=True, stable=True)``, and with
    ``order="rank"`` so is the order: ``-0.0`` equals ``+0.0``. There is one right answer, bit for bit, so no launch,
    device, batch or replay has another.

    Args:
        scores: float32 ``[..., N]`` on a CPU or GPU, any strides, N up to 2^31 - 1. Any numbers, infinities too.
        k: how many, 1 to N.
        order: of the results: ``"position"`` ascending, or ``"rank"``, the highest first.
        nan: ``"raise"`` looks for NaN and so waits for the device; ``"last"`` waits for nothing, and ranks NaN below
            -inf, by position (``torch.sort`` ranks it above inf). A CUDA graph is captured with ``nan="last"``, after
            one call like it outside, which compiles.
        backend: ``"reference"`` is PyTorch; ``"cuda"`` is CUDA C++, on a CPU emulated, slowly, for tests. ``"auto"``
            is CUDA C++ on GPUs of compute capability 9.0 and later, PyTorch elsewhere.

    Returns:
        float32 values and int64 indices, ``[..., k]``. Gradients flow through the values to scores that ask for them.

    Raises:
        ValueError: for anything else, naming the argument; for NaN, naming where, or, while a CUDA graph is captured,
            for ``nan="raise"``, which cannot be asked for there.
    """
    check_memory("scores", scores)
    require(scores.dtype == torch.float32, "scores.dtype", scores.dtype, "torch.float32: call float()")
    require(scores.ndim > 0, "scores.shape", tuple(scores.shape), "at least 1 dimension")
    n = scores.shape[-1]
    require(1 <= n <= MOST_KEYS, "scores.shape[-1]", n, f"1 to {MOST_KEYS} scores in a row")
    require(is_integer(k) and 1 <= k <= n, "k", k, f"an integer from 1 to the {n} scores of a row")
    require(order in ORDERS, "order", order, "'position' or 'rank'")
    require(nan in NANS, "nan", nan, "'raise' or 'last'")
    require(backend in BACKENDS, "backend", backend, "'auto', 'reference' or 'cuda'")
    if nan == "raise":
        allowed = "nan='last' while a CUDA graph is captured: nothing can be raised there"
        require(not captured(scores.device), "nan", nan, allowed)
    values, indices = _selected(scores.detach(), k, order == "rank", nan == "raise", backend)
    shape = (*scores.shape[:-1], k)
    indices = indices.view(shape)
    if values is None or scores.requires_grad or forward_ad.unpack_dual(scores).tangent is not None:
        return TopK(scores.gather(-1, indices), indices)
    return TopK(values.view(shape), indices)


def _selected(
    scores: torch.Tensor, k: int, by_rank: bool, refuse: bool, backend: str
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Values, where they come without a gather, and positions ``[rows, k]``."""
    rows, n = scores.numel() // scores.shape[-1], scores.shape[-1]
    if rows == 0:
        return None, torch.empty(0, k, dtype=torch.int64, device=scores.device)
    selector = None
    if backend == "cuda" or (backend == "auto" and scores.is_cuda):
        selector = selector_of(rows, n, k, by_rank, scores.device)
        needed = f"compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, or a CPU with g++"
        allowed = f"'auto' or 'reference': topk.cu needs {needed}"
        require(backend == "auto" or selector is not None, "backend", backend, allowed)
    flat = scores.reshape(rows, n)
    if selector is None:
        if refuse:
            _refuse_nan(scores)
        return None, reference.select(flat, k, by_rank)
    with torch.cuda.device_of(scores):
        values, indices, missing = selector(flat)
    if refuse and bool(missing.any()):
        _refuse_nan(scores)
    return values, indices


def _refuse_nan(scores: torch.Tensor) -> None:
    missing = torch.isnan(scores)
    if bool(missing.any()):
        where = tuple(missing.nonzero()[0].tolist())
        raise ValueError(f"scores[{where}]=nan: allowed is numbers, infinities too, or nan='last'")

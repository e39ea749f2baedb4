"""The public decode step: CUDA C++ where it runs, Triton elsewhere, the same indices and bits."""

from __future__ import annotations

import math

import torch

from ..storage.side import Stored
from ..validation import check_form, require
from .cuda import NativeStep, step_for
from .index import KeyIndex
from .triton_step import Decoder as TritonDecoder
from .triton_step import Step


class Decoder:
    """As :class:`TritonDecoder`, but in CUDA C++ where that runs; elsewhere it is one.

    Args:
        batch, heads, n, dim: sizes B, H, N, D.
        k: keys every query keeps, in 1..N.
        device: where it runs. On a CPU it is emulated, slowly, where g++ is there.

    Raises:
        ValueError: naming the argument, on a size that is not allowed.
    """

    def __init__(self, batch: int, heads: int, n: int, dim: int, k: int, device: torch.device | str) -> None:
        require(1 <= n < 1 << 31, "n", n, "1..2^31 - 1")
        require(1 <= k <= n, "k", k, f"1..{n}, the number of keys")
        self.sizes, self.n, self.k, self.device = (batch, heads, n, dim), n, k, device
        self.steps: dict[tuple[object, ...], NativeStep | None] = {}
        self.other: TritonDecoder | None = None

    def native(
        self, q: torch.Tensor, k: torch.Tensor | Stored, v: torch.Tensor | Stored, index: KeyIndex
    ) -> NativeStep | None:
        """What runs these in CUDA C++, or None."""
        kinds = (q.dtype, k.shape[1], v.shape[3], isinstance(k, Stored), isinstance(v, Stored), index.codes is not None)
        if kinds not in self.steps:
            self.steps[kinds] = step_for(q, k, v, index, self.k)
        return self.steps[kinds]

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor | Stored, v: torch.Tensor | Stored, index: KeyIndex,
        scale: float | None = None,
    ) -> Step:  # fmt: skip
        """Attend from ``q [B, H, 1, D]`` over keys and values ``[B, Hkv, N, D]``, tensors or 8-bit caches.

        ``index`` must be of these keys. Numbers are not looked at: the caller checks for NaN and Inf. ``rescored`` of
        the result tells the candidates of each program of a row.
        """
        check_form("q", q, 4)
        require(q.shape[2] == 1, "q.shape[2]", q.shape[2], "1: one query a head, as in decoding")
        require(k.shape[2] == self.n, "k.shape[2]", k.shape[2], f"{self.n}, for which this was made")
        step = self.native(q, k, v, index)
        if step is None:
            if self.other is None:
                self.other = TritonDecoder(*self.sizes, self.k, self.device)
            return self.other(q, k, v, index, scale)
        step.score(q, k, index)
        factor = 1 / math.sqrt(q.shape[3]) if scale is None else scale
        return Step(*step.choose(q, k, v, index, factor), step.count)

"""The k best of rows in PyTorch, on every device."""

from __future__ import annotations

import torch

from ..arithmetic.reference import CHUNK_ELEMENTS, sort_key

#: the word of what is no number: below that of minus infinity
NO_NUMBER = torch.iinfo(torch.int32).min


def words(scores: torch.Tensor) -> torch.Tensor:
    """int32 in the order of float32 ``scores`` (rule 4), below all where one is NaN."""
    return torch.where(torch.isnan(scores), NO_NUMBER, sort_key(scores))


def select(scores: torch.Tensor, k: int, by_rank: bool) -> torch.Tensor:
    """Positions of the ``k`` best of every row of float32 ``scores [rows, N]``, int64 ``[rows, k]``."""
    rows, n = scores.shape
    out = torch.empty(rows, k, dtype=torch.int64, device=scores.device)
    # One 64-bit word orders by score, then by lower position: all words of a row differ, so top-k has no ties.
    lowest_first = n - 1 - torch.arange(n, device=scores.device)
    at_once = max(1, 8 * CHUNK_ELEMENTS // n)
    for start in range(0, rows, at_once):
        some = slice(start, start + at_once)
        word = (words(scores[some]).to(torch.int64) << 32) | lowest_first
        best = n - 1 - (torch.topk(word, k, dim=-1, sorted=by_rank).values & 0xFFFFFFFF)
        out[some] = best if by_rank else best.sort(dim=-1).values
    return out

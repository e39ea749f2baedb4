"""What is kept beside keys in place, as they grow: of every group of 128 tokens the bounds, of every head the largest.

Parts of ``[B, Hkv, room, D]`` keys: ``norms [B, Hkv, groups]``, of each group the longest key; ``longest [B, Hkv]``,
of all; ``norm [B, Hkv]``, what the index says. With codes also ``codes``, ``scales``, and of what they leave out
``residuals`` a group, ``residual`` a head, and ``scaled_residuals`` a group, where every channel is divided by the root
of its scale; ``largest_scales [B, Hkv, D]``. Largest ones do not depend on the order in which tokens come, so an index
that grew equals one that is made anew. A group gets its codes when it is complete.

Here in PyTorch, for tokens whose places the host knows; ``append.py`` does the same on a GPU.
"""

from __future__ import annotations

import torch

from ..arithmetic.fast_scores import UPWARD, norms, over_roots
from ..arithmetic.reference import power_of_two
from .formats import EIGHT
from .side import quantized

#: tokens of a group
GROUP = EIGHT.group_size
#: groups that are quantised at once; bounds the memory of float64 copies
_AT_ONCE = 64

Parts = dict[str, torch.Tensor]


def raise_bounds(parts: Parts, start: int, end: int) -> None:
    """Take in the keys at the places [start, end), which are written; those before were taken in already."""
    if start == end:
        return
    for first in range(start // GROUP, -(-end // GROUP), _AT_ONCE):
        low, high = max(start, first * GROUP), min(end, (first + _AT_ONCE) * GROUP)
        found = _of_groups(norms(parts["k"][:, :, low:high]), low % GROUP)
        here = parts["norms"][:, :, first : first + found.shape[2]]
        if low % GROUP:
            found[:, :, 0] = torch.maximum(found[:, :, 0], here[:, :, 0])
        here.copy_(found)
        _raise(parts["longest" if "longest" in parts else "norm"], found.amax(2))
        if "codes" in parts and high // GROUP > first:
            _quantize(parts, first, high // GROUP)
    _say(parts)


def restate(parts: Parts, end: int) -> None:
    """State the bounds anew once only the keys at the places [0, end) are left."""
    groups, whole = -(-end // GROUP), end // GROUP
    if end % GROUP:
        parts["norms"][:, :, whole] = norms(parts["k"][:, :, whole * GROUP : end]).amax(2)
    longest = parts["longest" if "longest" in parts else "norm"].zero_()
    if groups:
        _raise(longest, parts["norms"][:, :, :groups].amax(2))
    if "codes" in parts:
        for name in ("residual", "largest_scales"):
            parts[name].zero_()
        if whole:
            _raise(parts["residual"], parts["residuals"][:, :, :whole].amax(2))
            _raise(parts["largest_scales"], power_of_two(parts["scales"][:, :, :whole].amax(2).int()))
    _say(parts)


def _raise(bound: torch.Tensor, found: torch.Tensor) -> None:
    bound.copy_(torch.maximum(bound, found))


def _say(parts: Parts) -> None:
    if "codes" in parts:
        parts["norm"].copy_((parts["longest"] + parts["residual"]) * UPWARD)


def _of_groups(x: torch.Tensor, before: int) -> torch.Tensor:
    """The largest of each group of 128, of numbers ``[B, Hkv, n]`` that follow ``before`` others in theirs."""
    return torch.nn.functional.pad(x, (before, -(before + x.shape[2]) % GROUP)).unflatten(2, (-1, GROUP)).amax(3)


def _quantize(parts: Parts, first: int, end: int) -> None:
    """Codes of the groups [first, end)."""
    tokens = parts["k"][:, :, first * GROUP : end * GROUP]
    codes, exponents, _ = quantized(tokens, EIGHT, tokens.dtype)
    parts["codes"][:, :, first * GROUP : end * GROUP] = codes
    parts["scales"][:, :, first:end] = exponents
    scales = power_of_two(exponents.int())
    left_out = tokens.float() - (codes.unflatten(2, (-1, GROUP)) * scales[:, :, :, None]).flatten(2, 3)
    residuals = _of_groups(norms(left_out), 0)
    parts["residuals"][:, :, first:end] = residuals
    parts["scaled_residuals"][:, :, first:end] = _of_groups(norms(over_roots(left_out, exponents, GROUP)), 0)
    _raise(parts["residual"], residuals.amax(2))
    _raise(parts["largest_scales"], scales.amax(2))

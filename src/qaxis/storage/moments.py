"""Sums over keys and values from which a line can be fitted to the values, along any query, without reading them again.

Tokens are taken by groups of 128, which begin at multiples of 128; only complete ones count. Of one group every sum is
a balanced tree over its tokens (arithmetic, rule 2); groups are added one after the other, from the first on, so sums
that grew equal sums that are made anew.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..arithmetic import reference as canonical
from .formats import EIGHT

#: tokens of a group
GROUP = EIGHT.group_size
#: rows and columns of products that are added together, by a program of a GPU; values and keys have rows of their own
TILE_ROWS, TILE_COLUMNS = 16, 64


def tiles_of(dim: int, dim_v: int) -> tuple[int, int, int]:
    """Tiles of the rows of values, of the rows of keys, and of the columns."""
    return -(-dim_v // TILE_ROWS), -(-dim // TILE_ROWS), -(-dim // TILE_COLUMNS)


class Moments(NamedTuple):
    """First and second moments of the keys, and of the values with the keys.

    Attributes:
        products: float32 ``[..., Dv + D, D]``, sums of ``x k^T`` over tokens, x being a value followed by its key.
        sums: float32 ``[..., Dv + D]``, sums of x.
    """

    products: torch.Tensor
    sums: torch.Tensor


def empty(k: torch.Tensor, v: torch.Tensor) -> Moments:
    """Moments of no token of keys ``[..., N, D]`` and values ``[..., N, Dv]``: zeros."""
    width, dim = v.shape[-1] + k.shape[-1], k.shape[-1]
    products = torch.zeros(*k.shape[:-2], width, dim, dtype=torch.float32, device=k.device)
    return Moments(products, torch.zeros(*k.shape[:-2], width, dtype=torch.float32, device=k.device))


def of_group(k: torch.Tensor, v: torch.Tensor) -> Moments:
    """Moments of one group: keys ``[..., 128, D]``, values ``[..., 128, Dv]``."""
    both = torch.cat([v.float(), k.float()], -1)
    columns, keys = both.transpose(-1, -2), k.float().transpose(-1, -2)
    per_row = keys.shape[-2] * GROUP * max(1, columns[..., 0, 0].numel())
    at_once = max(1, canonical.CHUNK_ELEMENTS // per_row)
    parts = [
        canonical.tree_sum(some[..., :, None, :] * keys[..., None, :, :]) for some in columns.split(at_once, dim=-2)
    ]
    return Moments(torch.cat(parts, -2), canonical.tree_sum(columns))


def add_groups(moments: Moments, k: torch.Tensor, v: torch.Tensor, first: int, end: int) -> Moments:
    """``moments``, and those of the groups [first, end) of keys ``[..., N, D]`` and values ``[..., N, Dv]``."""
    for group in range(first, end):
        tokens = slice(group * GROUP, (group + 1) * GROUP)
        one = of_group(k[..., tokens, :], v[..., tokens, :])
        moments = Moments(moments.products + one.products, moments.sums + one.sums)
    return moments

"""The same kind of tensor laid out in memory in every way that a caller may have it: no result may depend on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch


def _in_order(order: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Dimensions lie in memory in this order, the last one together."""
    back = tuple(order.index(i) for i in range(4))
    return lambda x: x.permute(order).contiguous().permute(back)


def _noise(x: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """What must not be read: NaN, or among integers what none of a test's is likely to be."""
    return torch.full(shape, torch.nan if x.dtype.is_floating_point else 77, dtype=x.dtype)


def _in_larger(x: torch.Tensor, *more: int) -> torch.Tensor:
    """``x`` at the start of every dimension of a larger tensor."""
    larger = _noise(x, [size + extra for size, extra in zip(x.shape, more, strict=True)])
    part = larger[tuple(slice(0, size) for size in x.shape)]
    return part.copy_(x)


def _every_second(x: torch.Tensor, dim: int) -> torch.Tensor:
    doubled = torch.stack([x, _noise(x, list(x.shape))], dim + 1).flatten(dim, dim + 1)
    return doubled[tuple(slice(None, None, 2) if i == dim else slice(None) for i in range(4))]


def _shifted(x: torch.Tensor) -> torch.Tensor:
    """One number behind an aligned address."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return flat.view(x.shape).copy_(x)


def _expanded(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The first of a dimension for all of it: stride 0. These are other numbers."""
    return lambda x: x.narrow(dim, 0, 1).expand_as(x)


#: by name: of a contiguous tensor [B, H, N, D] another of its shape
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{f"order {''.join('BHND'[i] for i in order)}": _in_order(order) for order in itertools.permutations(range(4))
       if order[0] == 0 or order == (2, 0, 1, 3)},
    "row of one more": lambda x: _in_larger(x, 0, 0, 0, 1),
    "row of 16 more": lambda x: _in_larger(x, 0, 0, 0, 16),
    "part of a larger one": lambda x: _in_larger(x, 1, 1, 3, 16),
    "every second token": lambda x: _every_second(x, 2),
    "every second channel": lambda x: _every_second(x, 3),
    "shifted by one": _shifted,
    **{f"one {name} for all": _expanded(dim) for dim, name in enumerate(("batch", "head", "token", "channel"))},
}  # fmt: skip

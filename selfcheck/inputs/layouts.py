"""The same tensor laid out in memory in every way that a caller may have it, and calls that every entry must refuse.

No result may depend on a layout: strides, alignment, distances beyond 32 bits. What surrounds a laid out tensor is NaN,
so that reading it is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from qaxis.decode import KeyIndex, index_keys

Change = Callable[[torch.Tensor], torch.Tensor]


def _in_order(*order: int) -> Change:
    """Dimensions lie in memory in this order, the last one together."""
    back = tuple(order.index(i) for i in range(4))
    return lambda x: x.permute(order).contiguous().permute(back)


def _in_larger(*more: int) -> Change:
    """Inside a larger tensor: so many numbers before and behind in every dimension."""

    def change(x: torch.Tensor) -> torch.Tensor:
        larger = x.new_full([size + 2 * extra for size, extra in zip(x.shape, more, strict=True)], math.nan)
        inside = tuple(slice(extra, extra + size) for size, extra in zip(x.shape, more, strict=True))
        return larger[inside].copy_(x)

    return change


def _row_of_one_more(x: torch.Tensor) -> torch.Tensor:
    """Rows of D + 1 numbers: no row but the first is aligned."""
    larger = x.new_full((*x.shape[:3], x.shape[3] + 1), math.nan)
    return larger[..., : x.shape[3]].copy_(x)


def _every_second_channel(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(3)[..., ::2]


def _misaligned(x: torch.Tensor) -> torch.Tensor:
    """Dense, one number behind an aligned address."""
    return x.new_full((x.numel() + 1,), math.nan)[1:].view(x.shape).copy_(x)


def _one_for_all(dim: int) -> Change:
    """The first of a dimension for all of it, stride 0. These are other numbers."""
    return lambda x: x.narrow(dim, 0, 1).expand_as(x)


def _far_apart(x: torch.Tensor) -> torch.Tensor:
    """Strides along the longest dimension take offsets beyond 2^31 numbers; on a CPU little of it is ever touched."""
    dim = max(range(3), key=lambda i: x.shape[i])
    if x.shape[dim] == 1:
        return x.contiguous()
    inner = x.numel() // x.shape[dim]
    step = max(inner, -(-(1 << 31) // (x.shape[dim] - 1)) + 15 & ~15)
    strides = [0, 0, 0, 1]
    within = x.shape[3]
    for i in (2, 1, 0):
        strides[i] = step if i == dim else within
        within *= 1 if i == dim else x.shape[i]
    storage = torch.empty(step * (x.shape[dim] - 1) + inner, dtype=x.dtype, device=x.device)
    return storage.as_strided(x.shape, strides).copy_(x)


#: of a tensor [B, H, N, D] another of its shape; the first is what the others may not differ from
LAYOUTS: dict[str, Change] = {
    "contiguous": torch.Tensor.contiguous,
    "token-major": _in_order(0, 2, 1, 3),
    "batch inside": _in_order(2, 1, 0, 3),
    "last dimension strided": _in_order(0, 1, 3, 2),
    "row of one more": _row_of_one_more,
    "every second channel": _every_second_channel,
    "misaligned": _misaligned,
    "part of a larger one": _in_larger(1, 1, 3, 16),
    "one head for all": _one_for_all(1),
    "one batch for all": _one_for_all(0),
    "one token for all": _one_for_all(2),
    "far apart": _far_apart,
}

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Malformed(NamedTuple):
    """A call that does not fit: what becomes of q, k and v, and which of them an error may name."""

    change: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Three]
    names: str


def _other_dtype(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float16 if x.dtype == torch.float32 else torch.float32)


def _other_device(x: torch.Tensor) -> torch.Tensor:
    return x.cpu() if x.is_cuda else x.to("meta")


def _three_heads(x: torch.Tensor) -> torch.Tensor:
    return x[:, :1].expand(-1, 3, -1, -1)


def _double(x: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.cat([x, x], dim)


#: of q ``[B, H, M, D]``, H not a multiple of 3, k and v ``[B, Hkv, N, D]``, Hkv at least 2
MALFORMED: dict[str, Malformed] = {
    "another head_dim": Malformed(lambda q, k, v: (q, k[..., : k.shape[3] // 2], v), "k"),
    "another head_dim of q": Malformed(lambda q, k, v: (q[..., : q.shape[3] // 2], k, v), "qk"),
    "another batch": Malformed(lambda q, k, v: (q, _double(k, 0), _double(v, 0)), "k"),
    "another batch of v": Malformed(lambda q, k, v: (q, k, v[:1]), "v"),
    "other heads": Malformed(lambda q, k, v: (q[:, :1], k, v), "q"),
    "other KV heads": Malformed(lambda q, k, v: (q, _three_heads(k), _three_heads(v)), "qk"),
    "other KV heads of v": Malformed(lambda q, k, v: (q, k, v[:, :1]), "v"),
    "short v": Malformed(lambda q, k, v: (q, k, v[:, :, :-1]), "v"),
    "long v": Malformed(lambda q, k, v: (q, k, _double(v, 2)), "v"),
    "another dtype of k": Malformed(lambda q, k, v: (q, _other_dtype(k), v), "k"),
    "another dtype of v": Malformed(lambda q, k, v: (q, k, _other_dtype(v)), "v"),
    "integers": Malformed(lambda q, k, v: (q.long(), k, v), "q"),
    "another device of k": Malformed(lambda q, k, v: (q, _other_device(k), v), "k"),
    "another device of v": Malformed(lambda q, k, v: (q, k, _other_device(v)), "v"),
    "no query": Malformed(lambda q, k, v: (q[:, :, :0], k, v), "q"),
    "no key": Malformed(lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), "k"),
    "no value": Malformed(lambda q, k, v: (q, k, v[..., :0]), "v"),
    "three dimensions": Malformed(lambda q, k, v: (q, k[0], v[0]), "k"),
    "five dimensions": Malformed(lambda q, k, v: (q[None], k, v), "q"),
}
#: more for entries that were made for one shape
MALFORMED_SHAPE: dict[str, Malformed] = {
    "more of a batch": Malformed(lambda q, k, v: (_double(q, 0), _double(k, 0), _double(v, 0)), "q"),
    "more heads": Malformed(lambda q, k, v: (_double(q, 1), _double(k, 1), _double(v, 1)), "q"),
    "more queries": Malformed(lambda q, k, v: (_double(q, 2), k, v), "q"),
    "fewer keys": Malformed(lambda q, k, v: (q, k[:, :, :-1], v[:, :, :-1]), "k"),
    "more keys": Malformed(lambda q, k, v: (q, _double(k, 2), _double(v, 2)), "k"),
}


def _part(change: Change, part: str) -> Callable[[torch.Tensor], KeyIndex]:
    """The right index but for one part of it."""

    def made(k: torch.Tensor) -> KeyIndex:
        index = index_keys(k)
        return KeyIndex(**{**vars(index), part: change(getattr(index, part))})

    return made


#: of keys ``[B, Hkv, N, D]`` an index that is not of them
MALFORMED_INDEX: dict[str, Callable[[torch.Tensor], object]] = {
    "none": lambda k: None,
    "of fewer keys": lambda k: index_keys(k[:, :, :-1].contiguous(), codes=True),
    "of one batch": lambda k: index_keys(k[:1]),
    "of one head": lambda k: index_keys(k[:, :1]),
    "of another head_dim": lambda k: index_keys(k[..., : k.shape[3] // 2].contiguous(), codes=True),
    "another dtype of the bound": _part(torch.Tensor.double, "norm"),
    "another device of the bound": _part(_other_device, "norm"),
}

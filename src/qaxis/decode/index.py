"""What is kept beside the keys so that a fast score has a proven error: codes, and one bound a head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..arithmetic.fast_scores import UPWARD, largest_norm
from ..arithmetic.reference import power_of_two
from ..storage.grid import Grid
from ..storage.lazy import checked_tensor, stored_or_tensor
from ..storage.side import Side, Stored
from ..storage.triton import readable
from ..validation import check_flag, check_memory, require

#: keys that are quantised, or looked at, at once: more of them take fewer steps, and memory for float32 copies
AT_ONCE = 1 << 14
#: tokens that share a scale: fewer would leave no room for neighbourhoods, the codes of more do not fit into a program
GROUP_SIZES = (64, 128, 256)


@dataclass(frozen=True)
class KeyIndex:
    """Bounds on the keys ``[B, Hkv, N, D]`` of one layer and, if asked for, their 8-bit codes.

    Attributes:
        norm: float32 ``[B, Hkv]``, at least the length of every key, and of what its codes stand for.
        residual: float32 ``[B, Hkv]``, at least the length of what the codes leave out of any key.
        largest_scales: float32 ``[B, Hkv, D]``, of every channel the largest scale.
        codes: the codes as the 8-bit cache stores them, or None.

    Raises:
        ValueError: for a bound that is no tensor.
    """

    norm: torch.Tensor
    residual: torch.Tensor
    largest_scales: torch.Tensor
    codes: Stored | None = None

    def __post_init__(self) -> None:
        for name in ("norm", "residual", "largest_scales"):
            x = getattr(self, name)
            require(isinstance(x, torch.Tensor), f"index.{name}", type(x).__name__, "a torch.Tensor")
            # Kernels read the bounds one after the other.
            object.__setattr__(self, name, x.contiguous())

    def is_of(self, k: Stored) -> bool:
        """Whether the codes are those of the cache ``k`` in its present state: as many tokens at the same places."""
        return self.codes is not None and _same(self.codes, k)

    def check_form(self, k: torch.Tensor | Stored) -> None:
        """Check that this can be the index of ``k [B, Hkv, N, D]``, without looking at the numbers.

        Raises:
            ValueError: naming the part, its value and what is allowed.
        """
        heads, device = tuple(k.shape[:2]), k.device
        for name, shape in (("norm", heads), ("residual", heads), ("largest_scales", (*heads, k.shape[3]))):
            x = getattr(self, name)
            check_memory(f"index.{name}", x)
            require(tuple(x.shape) == shape, f"index.{name}.shape", tuple(x.shape), f"{shape}, as k has it")
            require(x.dtype == torch.float32, f"index.{name}.dtype", x.dtype, "torch.float32")
            require(x.device == device, f"index.{name}.device", str(x.device), f"k's device {device}")
        if isinstance(k, Stored):
            require(self.is_of(k), "index.codes", type(self.codes).__name__, "those of k itself: index_cache(k)")
        if self.codes is not None:
            check_codes("index.codes", self.codes)
            shape = tuple(k.shape)
            require(self.codes.shape == shape, "index.codes.shape", self.codes.shape, f"k's {shape}")
            require(self.codes.device == device, "index.codes.device", str(self.codes.device), f"k's device {device}")


def check_codes(name: str, stored: Stored) -> None:
    """Check the form of codes that keys can be scored by.

    Raises:
        ValueError: naming the part, its value and what is allowed.
    """
    require(isinstance(stored, Stored), name, type(stored).__name__, "one side of a cache, a Stored")
    stored.check_form(name)
    grid = stored.grid
    allowed = grid.bits == 8 and grid.per == "channel" and grid.group_size in GROUP_SIZES
    require(allowed, f"{name}.grid", grid, f"8 bits per channel in groups of {GROUP_SIZES} tokens")


def _same(a: Stored, b: Stored) -> bool:
    """Whether both are one state of one cache: the same numbers of tokens at the same places."""
    pairs = ((a.codes, b.codes), (a.scales, b.scales), (a.first, b.first), (a.newest, b.newest))
    return a is b or (a.grid == b.grid and all(_same_place(x, y) for x, y in pairs))


def _same_place(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def _largest_scales(stored: Stored) -> torch.Tensor:
    if stored.scales.shape[2] == 0:
        return torch.zeros(
            *stored.scales.shape[:2], stored.dim, dtype=torch.float32, device=stored.scales.device
        )  # fmt: skip
    return power_of_two(stored.scales.int()).amax(2)


def index_keys(k: torch.Tensor, *, codes: bool = False) -> KeyIndex:
    """Index of keys ``k [B, Hkv, N, D]``; with ``codes`` it holds half of a bfloat16 key more, and scores faster.

    Args:
        k: float32, float16 or bfloat16, of any strides. Whether its numbers are finite is left to the caller. What the
            ``update`` of a quantised cache returns is dequantised: :func:`index_cache` is the index of its codes.
        codes: whether to keep 8-bit codes of the keys beside their bounds.

    Raises:
        ValueError: naming ``k``, on another type, layout, dtype or shape; or ``codes``.
    """
    k = checked_tensor("k", k, 4)
    check_flag("codes", codes)
    norm = largest_norm(k)
    zero = torch.zeros_like(norm)
    if not codes:
        return KeyIndex(norm, zero, torch.zeros(*norm.shape, k.shape[3], dtype=torch.float32, device=k.device))
    side = Side(k, Grid(), room=k.shape[2])
    for part in k.split(AT_ONCE, dim=2):
        side.prepare(part)()
    stored = side.stored()
    whole = stored.codes.shape[2]
    residual = zero
    for start in range(0, whole, AT_ONCE):
        some = slice(start, min(start + AT_ONCE, whole))
        left_out = k[:, :, some].float() - _whole(stored, some)
        residual = torch.maximum(residual, largest_norm(left_out))
    return KeyIndex((norm + residual) * UPWARD, residual, _largest_scales(stored), stored)


def index_cache(stored: Stored) -> KeyIndex:
    """Index of keys that are an 8-bit cache themselves: the codes are the keys, nothing is left out.

    Args:
        stored: the keys ``[B, Hkv, N, D]`` of a layer, 8 bits per channel, of float32 or bfloat16, or what the
            ``update`` of such a cache returned for them. The index is of this state: once the cache has grown, make
            another. Whether its numbers are finite is left to the caller.

    Raises:
        ValueError: naming ``stored``, for a tensor, parts that do not fit, or a format that no kernel scores by.
    """
    stored = stored_or_tensor(stored)
    check_codes("stored", stored)
    require(readable(stored), "stored.dtype", stored.dtype, "torch.float32 or torch.bfloat16, which hold every number")
    n = stored.codes.shape[2]
    norm = torch.maximum(largest_norm(stored.first), largest_norm(stored.newest if stored.newest is not None
                                                                   else stored.first))  # fmt: skip
    for start in range(0, n, AT_ONCE):
        norm = torch.maximum(norm, largest_norm(_whole(stored, slice(start, min(start + AT_ONCE, n)))))
    return KeyIndex(norm, torch.zeros_like(norm), _largest_scales(stored), stored)


def _whole(stored: Stored, part: slice) -> torch.Tensor:
    """Codes of the tokens ``part``, whole groups, as float32 numbers; exact, as scales are powers of two."""
    group_size = stored.grid.group_size
    scales = power_of_two(stored.scales[:, :, part.start // group_size : part.stop // group_size].int())
    return (stored.codes[:, :, part].unflatten(2, (-1, group_size)) * scales[:, :, :, None]).flatten(2, 3)

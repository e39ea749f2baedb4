"""What is kept beside the keys so that a fast score has a proven error: codes, and one bound a head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..arithmetic.reference import power_of_two
from ..validation import check_memory, require
from .side import Stored

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
        scaled_residuals: float32 ``[B, Hkv, groups]``, of each whole group of tokens that share their scales: at
            least the length of what the codes leave out of any key, every channel divided by the root of its scale.
            None where ``residual`` says it all, as where the codes are the keys.

    Raises:
        ValueError: for a bound that is no tensor.
    """

    norm: torch.Tensor
    residual: torch.Tensor
    largest_scales: torch.Tensor
    codes: Stored | None = None
    scaled_residuals: torch.Tensor | None = None

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
        if self.scaled_residuals is not None:
            self._check_residuals(heads, device)

    def _check_residuals(self, heads: tuple[int, ...], device: torch.device) -> None:
        x, name = self.scaled_residuals, "index.scaled_residuals"
        require(self.codes is not None, name, "given", "None where there are no codes")
        require(isinstance(x, torch.Tensor), name, type(x).__name__, "a torch.Tensor, or None")
        assert x is not None and self.codes is not None
        check_memory(name, x)
        shape = (*heads, self.codes.scales.shape[2])
        require(tuple(x.shape) == shape, f"{name}.shape", tuple(x.shape), f"{shape}: one of every whole group")
        require(x.dtype == torch.float32, f"{name}.dtype", x.dtype, "torch.float32")
        require(x.device == device, f"{name}.device", str(x.device), f"k's device {device}")
        # As kernels take them.
        require(max(x.stride(), default=0) < 1 << 31, f"{name}.stride()", x.stride(), "strides below 2**31")


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


def largest_scales(stored: Stored) -> torch.Tensor:
    """Of every channel the largest scale of 8-bit codes, float32 ``[B, Hkv, D]``."""
    if stored.scales.shape[2] == 0:
        return torch.zeros(
            *stored.scales.shape[:2], stored.dim, dtype=torch.float32, device=stored.scales.device
        )  # fmt: skip
    return power_of_two(stored.scales.int()).amax(2)


def whole_groups(stored: Stored, part: slice) -> torch.Tensor:
    """Codes of the tokens ``part``, whole groups, as float32 numbers; exact, as scales are powers of two."""
    group_size = stored.grid.group_size
    scales = power_of_two(stored.scales[:, :, part.start // group_size : part.stop // group_size].int())
    return (stored.codes[:, :, part].unflatten(2, (-1, group_size)) * scales[:, :, :, None]).flatten(2, 3)

"""The keys, or the values, of one layer: codes that grow, and the newest tokens in full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..validation import DTYPES, check_finite, check_memory, is_integer, require
from .buffer import SHARE, Growing, joined
from .grid import Grid, dequantize, pack, quantize, unpack

#: tokens that codes grow by, at least
LEAST_TOKENS = 1024


@dataclass(frozen=True)
class Stored:
    """One side as it is stored at one time.

    With D = ``dim``, and n tokens that are quantised: codes ``[B, Hkv, n, D]`` int8, or packed uint8 below 8 bits;
    scales (and zeros) ``[B, Hkv, n / group_size, D]`` per channel or ``[B, Hkv, n, D / width]`` per token; the newest
    ``[B, Hkv, N - n, D]`` in the model's dtype, per channel only. The first ``[B, Hkv, s, D]``, in the model's
    dtype, are read in place of the codes of the first s tokens.
    """

    grid: Grid
    dtype: torch.dtype
    dim: int
    width: int
    codes: torch.Tensor
    scales: torch.Tensor
    first: torch.Tensor
    zeros: torch.Tensor | None = None
    newest: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens, N."""
        return self.codes.shape[2] + (0 if self.newest is None else self.newest.shape[2])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(B, Hkv, N, D)``, of the tensor that this stands for."""
        return (*self.codes.shape[:2], self.length, self.dim)  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def check_form(self, name: str) -> None:
        """Check that the parts are dense tensors that fit each other, without looking at the numbers.

        Raises:
            ValueError: naming the part, its type, layout, shape, dtype or device, and what is allowed.
        """
        self._check_parts(name)
        batch, heads, n = self.codes.shape[:3]
        packed = self.dim if self.grid.bits == 8 else (self.dim + -self.dim % 8) * self.grid.bits // 8
        per_token = self.grid.per == "token"
        shared = (n, self.dim // self.width) if per_token else (n // self.grid.group_size, self.dim)
        small = torch.int8 if self.grid.bits == 8 else torch.uint8
        whole_groups = n % self.grid.tokens == 0 and self.length >= 1
        require(whole_groups, f"{name}.codes.shape", tuple(self.codes.shape), f"whole groups of {self.grid.tokens}")
        expected: dict[str, tuple[torch.Tensor | None, tuple[int, ...], torch.dtype]] = {
            "codes": (self.codes, (batch, heads, n, packed), small),
            "scales": (self.scales, (batch, heads, *shared), small),
            "first": (self.first, (batch, heads, min(self.first.shape[2], self.length), self.dim), self.dtype),
            "zeros": (self.zeros, (batch, heads, *shared), torch.int8),
            "newest": (self.newest, (batch, heads, self.length - n, self.dim), self.dtype),
        }
        for part, (x, shape, dtype) in expected.items():
            if x is not None:
                require(tuple(x.shape) == shape, f"{name}.{part}.shape", tuple(x.shape), f"{shape}")
                require(x.dtype == dtype, f"{name}.{part}.dtype", x.dtype, f"{dtype}")
                require(x.device == self.device, f"{name}.{part}.device", str(x.device), f"{self.device}")

    def _check_parts(self, name: str) -> None:
        """Check every part for itself, so that the others can be compared with it."""
        require(isinstance(self.grid, Grid), f"{name}.grid", self.grid, "a qaxis.storage.grid.Grid")
        require(self.dtype in DTYPES, f"{name}.dtype", self.dtype, "float32, float16 or bfloat16")
        require(is_integer(self.dim) and self.dim >= 1, f"{name}.dim", self.dim, "an integer of at least 1")
        width = width_of(self.grid, self.dim)
        require(is_integer(self.width) and self.width == width, f"{name}.width", self.width, f"{width}")
        for part in ("codes", "scales", "first", "zeros", "newest"):
            x = getattr(self, part)
            if x is not None or part in ("codes", "scales", "first"):
                check_memory(f"{name}.{part}", x)
                require(x.ndim == 4, f"{name}.{part}.shape", tuple(x.shape), "4 dimensions")
                require(min(x.shape[:2]) >= 1, f"{name}.{part}.shape", tuple(x.shape), "a batch and a head at least")
        for part, wanted in (("zeros", self.grid.zero), ("newest", self.grid.per == "channel")):
            given = getattr(self, part) is not None
            require(given == wanted, f"{name}.{part}", type(getattr(self, part)).__name__, f"one only if {self.grid}")

    def check_finite(self, name: str) -> None:
        """Refuse NaN and Inf among the tokens kept in full; what codes stand for is finite."""
        check_finite(**{f"{name}.first": self.first, f"{name}.newest": self.newest})

    def dequantized(self) -> torch.Tensor:
        """All tokens, ``[B, Hkv, N, D]`` in the model's dtype."""
        out = self._without_first()
        out[:, :, : self.first.shape[2]] = self.first
        return out

    def _without_first(self) -> torch.Tensor:
        codes, parts = self.codes, (self.scales, self.zeros)
        if self.grid.bits < 8:
            codes = unpack(codes, self.grid.bits)[..., : self.dim]
        if self.newest is None:
            scales, zeros = (x if x is None else x[..., None] for x in parts)
            split = codes.unflatten(-1, (-1, self.width))
            return dequantize(split, scales, zeros, self.grid, self.dtype).flatten(-2)  # type: ignore[arg-type]
        if codes.shape[2] == 0:
            return self.newest.clone()
        scales, zeros = (x if x is None else x[:, :, :, None] for x in parts)
        split = codes.unflatten(2, (-1, self.grid.group_size))
        whole = dequantize(split, scales, zeros, self.grid, self.dtype).flatten(2, 3)  # type: ignore[arg-type]
        return joined([whole, self.newest], 2) if self.newest.shape[2] else whole


def width_of(grid: Grid, dim: int) -> int:
    """Channels of a token that share a scale; all, where one is of a channel or the group does not divide ``dim``."""
    return grid.group_size if grid.per == "token" and dim % grid.group_size == 0 else dim


def quantized(
    x: torch.Tensor, grid: Grid, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(codes, scales, zeros) as stored, of tokens ``[B, Hkv, n, D]`` in whole groups, that are read as ``dtype``."""
    x, largest, dim = x.float(), torch.finfo(dtype).max, x.shape[3]
    if grid.per == "channel":
        codes, scales, zeros = quantize(x.unflatten(2, (-1, grid.tokens)), 3, grid, largest)
        codes, scales = codes.flatten(2, 3), scales.squeeze(3)
        zeros = None if zeros is None else zeros.squeeze(3)
    else:
        codes, scales, zeros = quantize(x.unflatten(-1, (-1, width_of(grid, dim))), -1, grid, largest)
        codes, scales = codes.flatten(-2), scales.squeeze(-1)
        zeros = None if zeros is None else zeros.squeeze(-1)
    if grid.bits < 8:
        codes = pack(torch.nn.functional.pad(codes, (0, -dim % 8)), grid.bits)
    return codes, scales, zeros


class Side:
    """The keys, or the values, of one layer."""

    def __init__(self, like: torch.Tensor, grid: Grid, sinks: int = 0, room: int = 0) -> None:
        """Empty, for parts shaped and typed as ``like [B, Hkv, *, D]``, with room for ``room`` tokens.

        The first ``sinks`` tokens are kept in full and take no part in their group's scales.
        """
        self.grid, self.dtype, self.dim, self.sinks = grid, like.dtype, like.shape[3], sinks
        self.width = width_of(grid, self.dim)
        self.parts: dict[str, Growing] = {}
        codes, scales, zeros = self._quantized(torch.zeros_like(like[:, :, :1]).expand(-1, -1, self.grid.tokens, -1))
        groups = room // self.grid.tokens
        self.parts = {"codes": Growing(codes, groups * self.grid.tokens), "scales": Growing(scales, groups)}
        self.parts["first"] = Growing(like, sinks)
        if zeros is not None:
            self.parts["zeros"] = Growing(zeros, groups)
        if grid.per == "channel":
            self.parts["newest"] = Growing(like)

    @property
    def length(self) -> int:
        return self.parts["codes"].length + (self.parts["newest"].length if "newest" in self.parts else 0)

    def _quantized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return quantized(x, self.grid, self.dtype)

    def reserve(self, n: int) -> None:
        """Make room for ``n`` tokens in all: an exact fit, in whole groups, the first time; then by blocks."""
        groups, room = n // self.grid.tokens, self.parts["codes"].buffer.shape[2] // self.grid.tokens
        if groups > room:
            least = max(1, LEAST_TOKENS // self.grid.tokens)
            groups = groups if self.length == 0 else max(groups, room + max(least, room // SHARE))
            self.parts["codes"].grow(groups * self.grid.tokens)
            for name in ("scales", "zeros"):
                if name in self.parts:
                    self.parts[name].grow(groups)
        if n % self.grid.tokens:
            self.open_group()

    def has_room(self, n: int) -> bool:
        """Whether ``n`` tokens in all find room where the parts lie."""
        groups, rest = divmod(n, self.grid.tokens)
        opened = rest == 0 or self.parts["newest"].buffer.shape[2] > 0
        return opened and groups * self.grid.tokens <= self.parts["codes"].buffer.shape[2]

    def open_group(self) -> None:
        """Make room for a group that is not complete; not before there is one."""
        if self.parts["newest"].buffer.shape[2] == 0:
            self.parts["newest"].grow(self.grid.tokens)

    def count(self, n: int) -> None:
        """Count ``n`` tokens, which are stored, whoever stored them."""
        whole = n // self.grid.tokens
        lengths = {"codes": whole * self.grid.tokens, "first": min(n, self.sinks), "newest": n % self.grid.tokens}
        for name, growing in self.parts.items():
            growing.length = lengths.get(name, whole)

    def prepare(self, x: torch.Tensor) -> Callable[[], None]:
        """Quantise what ``x [B, Hkv, n, D]`` completes; the returned function stores it.

        Everything that can fail is done here, so that a cache is never left half written.
        """
        missing = self.sinks - self.parts["first"].length
        if self.grid.per == "token":
            whole, newest = x, None
        elif self.parts["newest"].length + x.shape[2] < self.grid.tokens:
            whole, newest = x[:, :, :0], x
        else:
            waiting = joined([self.parts["newest"].view(), x], 2)
            split = waiting.shape[2] // self.grid.tokens * self.grid.tokens
            whole, newest = waiting[:, :, :split], waiting[:, :, split:]
        if self.grid.per == "channel" and self.sinks and self.parts["codes"].length == 0 and whole.shape[2]:
            # An outlier that is kept in full must not widen the scales of its group; its neighbour stands in for it.
            others = whole[:, :, self.sinks :]
            whole = joined([others[:, :, :1].expand(-1, -1, self.sinks, -1), others], 2)
        made = self._quantized(whole) if whole.shape[2] else None

        def commit() -> None:
            self.reserve(self.length + x.shape[2])
            if missing > 0:
                self.parts["first"].append(x[:, :, :missing])
            if made is not None:
                for name, part in zip(("codes", "scales", "zeros"), made, strict=True):
                    if part is not None:
                        self.parts[name].append(part)
            if newest is not None and made is None:
                self.parts["newest"].append(x)
            elif newest is not None:
                self.parts["newest"].length = 0
                self.parts["newest"].append(newest)

        return commit

    def stored(self) -> Stored:
        """What is stored now; later appends do not change it."""
        parts = {name: growing.view() for name, growing in self.parts.items()}
        return Stored(self.grid, self.dtype, self.dim, self.width, **parts)

    def dequantized(self) -> torch.Tensor:
        """All tokens, ``[B, Hkv, N, D]`` in the model's dtype."""
        return self.stored().dequantized()

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens. Those of a group that is cut open wait again, with the values they had."""
        groups = min(length, self.parts["codes"].length) // self.grid.tokens
        if "newest" in self.parts and length < self.parts["codes"].length:
            opened = self._group(groups)[:, :, : length % self.grid.tokens]
            self.parts["newest"].length = 0
            if opened.shape[2]:
                self.open_group()
                self.parts["newest"].append(opened)
        elif "newest" in self.parts:
            self.parts["newest"].crop(length - self.parts["codes"].length)
        self.parts["codes"].crop(groups * self.grid.tokens)
        self.parts["first"].crop(length)
        for name in ("scales", "zeros"):
            if name in self.parts:
                self.parts[name].crop(groups)

    def _group(self, g: int) -> torch.Tensor:
        """The numbers of a complete group, ``[B, Hkv, group_size, D]``."""
        return self.numbers(g * self.grid.tokens, (g + 1) * self.grid.tokens)

    def numbers(self, start: int, end: int) -> torch.Tensor:
        """The numbers of the tokens [start, end), ``[B, Hkv, end - start, D]``; few are dequantised if all have codes
        and are whole groups."""
        tokens = self.grid.tokens
        if start % tokens or end % tokens or end > self.parts["codes"].length:
            return self.dequantized()[:, :, start:end]
        parts = {name: growing.view() for name, growing in self.parts.items()}
        parts["codes"] = parts["codes"][:, :, start:end]
        for name in ("scales", "zeros"):
            if name in parts:
                parts[name] = parts[name][:, :, start // tokens : end // tokens]
        if "newest" in parts:
            parts["newest"] = parts["newest"][:, :, :0]
        parts["first"] = parts["first"][:, :, start : min(end, self.sinks)]
        return Stored(self.grid, self.dtype, self.dim, self.width, **parts).dequantized()

    def nbytes(self) -> int:
        """Bytes of the storage, room for growth included."""
        return sum(p.buffer.untyped_storage().nbytes() for p in self.parts.values())

"""The keys, or the values, of one layer: codes that grow, and the newest tokens in full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .growing import Growing
from .quantization import Grid, dequantize, pack, quantize, unpack


@dataclass(frozen=True)
class Stored:
    """One side as it is stored at one time.

    With D = ``dim``, and n tokens that are quantised: codes ``[B, Hkv, n, D]`` int8, or packed uint8 below 8 bits;
    scales (and zeros) ``[B, Hkv, n / group, D]`` per channel or ``[B, Hkv, n, D / width]`` per token; the tail
    ``[B, Hkv, N - n, D]`` in the model's dtype, per channel only. The head ``[B, Hkv, s, D]``, in the model's
    dtype, is read in place of the codes of the first s tokens.
    """

    grid: Grid
    dtype: torch.dtype
    dim: int
    width: int
    codes: torch.Tensor
    scales: torch.Tensor
    head: torch.Tensor
    zeros: torch.Tensor | None = None
    tail: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens, N."""
        return self.codes.shape[2] + (0 if self.tail is None else self.tail.shape[2])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(B, Hkv, N, D)``, of the tensor that this stands for."""
        return (*self.codes.shape[:2], self.length, self.dim)  # type: ignore[return-value]

    def dequantized(self) -> torch.Tensor:
        """All tokens, ``[B, Hkv, N, D]`` in the model's dtype."""
        out = self._without_head()
        out[:, :, : self.head.shape[2]] = self.head
        return out

    def _without_head(self) -> torch.Tensor:
        codes, parts = self.codes, (self.scales, self.zeros)
        if self.grid.bits < 8:
            codes = unpack(codes, self.grid.bits)[..., : self.dim]
        if self.tail is None:
            scales, zeros = (x if x is None else x[..., None] for x in parts)
            split = codes.unflatten(-1, (-1, self.width))
            return dequantize(split, scales, zeros, self.grid, self.dtype).flatten(-2)  # type: ignore[arg-type]
        if codes.shape[2] == 0:
            return self.tail.clone()
        scales, zeros = (x if x is None else x[:, :, :, None] for x in parts)
        split = codes.unflatten(2, (-1, self.grid.group))
        whole = dequantize(split, scales, zeros, self.grid, self.dtype).flatten(2, 3)  # type: ignore[arg-type]
        return torch.cat([whole, self.tail], dim=2) if self.tail.shape[2] else whole


class Side:
    """The keys, or the values, of one layer."""

    def __init__(self, like: torch.Tensor, grid: Grid, sinks: int = 0, room: int = 0) -> None:
        """Empty, for parts shaped and typed as ``like [B, Hkv, *, D]``, with room for ``room`` tokens.

        The first ``sinks`` tokens are kept in full and take no part in their group's scales.
        """
        self.grid, self.dtype, self.dim, self.sinks = grid, like.dtype, like.shape[3], sinks
        per_token = grid.per == "token"
        # A head_dim that the group does not divide shares one scale.
        self.width = grid.group if per_token and self.dim % grid.group == 0 else self.dim
        self.parts: dict[str, Growing] = {}
        codes, scales, zeros = self._quantized(torch.zeros_like(like[:, :, :1]).expand(-1, -1, self._step, -1))
        groups = room // self._step
        self.parts = {"codes": Growing(codes, groups * self._step), "scales": Growing(scales, groups)}
        self.parts["head"] = Growing(like)
        if zeros is not None:
            self.parts["zeros"] = Growing(zeros, groups)
        if not per_token:
            self.parts["tail"] = Growing(like)

    @property
    def _step(self) -> int:
        """Tokens that are quantised together."""
        return self.grid.group if self.grid.per == "channel" else 1

    @property
    def length(self) -> int:
        return self.parts["codes"].length + (self.parts["tail"].length if "tail" in self.parts else 0)

    def _quantized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(codes, scales, zeros) as they are stored, of tokens ``[B, Hkv, n, D]``, n a multiple of the step."""
        x = x.float()
        if self.grid.per == "channel":
            codes, scales, zeros = quantize(x.unflatten(2, (-1, self._step)), 3, self.grid)
            codes, scales = codes.flatten(2, 3), scales.squeeze(3)
            zeros = None if zeros is None else zeros.squeeze(3)
        else:
            codes, scales, zeros = quantize(x.unflatten(-1, (-1, self.width)), -1, self.grid)
            codes, scales = codes.flatten(-2), scales.squeeze(-1)
            zeros = None if zeros is None else zeros.squeeze(-1)
        if self.grid.bits < 8:
            codes = pack(torch.nn.functional.pad(codes, (0, -self.dim % 8)), self.grid.bits)
        return codes, scales, zeros

    def prepare(self, x: torch.Tensor) -> Callable[[], None]:
        """Quantise what ``x [B, Hkv, n, D]`` completes; the returned function stores it.

        Everything that can fail is done here, so that a cache is never left half written.
        """
        missing = self.sinks - self.parts["head"].length
        if self.grid.per == "token":
            whole, tail = x, None
        elif self.parts["tail"].length + x.shape[2] < self._step:
            whole, tail = x[:, :, :0], x
        else:
            waiting = torch.cat([self.parts["tail"].view(), x], dim=2)
            split = waiting.shape[2] // self._step * self._step
            whole, tail = waiting[:, :, :split], waiting[:, :, split:]
        if self.grid.per == "channel" and self.sinks and self.parts["codes"].length == 0 and whole.shape[2]:
            # An outlier that is kept in full must not widen the scales of its group; its neighbour stands in for it.
            whole = torch.cat([whole[:, :, self.sinks :][:, :, :1].expand(-1, -1, self.sinks, -1),
                               whole[:, :, self.sinks :]], dim=2)  # fmt: skip
        made = self._quantized(whole) if whole.shape[2] else None

        def commit() -> None:
            if missing > 0:
                self.parts["head"].append(x[:, :, :missing])
            if made is not None:
                for name, part in zip(("codes", "scales", "zeros"), made, strict=True):
                    if part is not None:
                        self.parts[name].append(part)
            if tail is not None and made is None:
                self.parts["tail"].append(x)
            elif tail is not None:
                fresh = Growing(tail)
                fresh.append(tail)
                self.parts["tail"] = fresh

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
        groups = min(length, self.parts["codes"].length) // self._step
        if "tail" in self.parts:
            opened = self.dequantized()[:, :, groups * self._step : length]
            self.parts["tail"] = Growing(opened)
            if opened.shape[2]:
                self.parts["tail"].append(opened)
        self.parts["codes"].crop(groups * self._step)
        self.parts["head"].crop(length)
        for name in ("scales", "zeros"):
            if name in self.parts:
                self.parts[name].crop(groups)

    def nbytes(self) -> int:
        """Bytes of the storage, room for growth included."""
        return sum(p.buffer.untyped_storage().nbytes() for p in self.parts.values())

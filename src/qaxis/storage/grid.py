"""Codes and scales of the KV cache: everything that is dequantised is exact in bfloat16.

A number is stored as an integer of a few bits times a scale that it shares with its group. bfloat16 has a
significand of 8 bits, so if the integer takes a bits and the significand of the scale b bits, the product is
exact there as long as a + b <= 8, or b = 1 (a power of two) and a <= 8. Scales are chosen under that rule: few
bits of the integer leave room for a finer scale, 8 bits leave only powers of two.

A scale is one byte. With 8-bit codes it is an exponent, 2^-126 to 2^126. With fewer bits it is a small floating
point number: 5 bits of exponent, 3 of significand, 2^-20 to 15/8 * 2^11.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..arithmetic.reference import power_of_two
from ..validation import is_integer, require

#: smallest exponent of a one-byte scale with three bits of significand, and the largest such scale
LOWEST, LARGEST_SCALE = -20, 15 / 8 * 2.0**11
#: the largest finite float32
LARGEST_NUMBER = torch.finfo(torch.float32).max
#: bits of bfloat16's significand, the hidden one included
SIGNIFICAND = 8


@dataclass(frozen=True)
class Grid:
    """How one side of the cache (keys, or values) is quantised.

    Args:
        bits: 2 to 8 bits a code.
        per: ``"channel"``: one scale for a channel over ``group_size`` tokens; ``"token"``: one for
            ``group_size`` channels of a token (the whole head_dim if that is not a multiple of it).
        group_size: how many numbers share a scale.
        zero: also store one signed byte a group, the integer that code 0 stands for. Without it the codes are
            symmetric around 0.

    Raises:
        ValueError: for a value that is not allowed.
    """

    bits: int = 8
    per: str = "channel"
    group_size: int = 128
    zero: bool = False

    def __post_init__(self) -> None:
        require(is_integer(self.bits) and 2 <= self.bits <= 8, "bits", self.bits, "an integer in 2..8")
        require(self.per in ("channel", "token"), "per", self.per, "'channel' or 'token'")
        require(
            is_integer(self.group_size) and self.group_size >= 1, "group_size", self.group_size, "a positive integer"
        )
        require(
            not (self.zero and self.bits == 8), "zero", self.zero, "False with 8 bits: integers would outgrow bfloat16"
        )

    @property
    def tokens(self) -> int:
        """Tokens that are quantised together."""
        return self.group_size if self.per == "channel" else 1

    @property
    def limit(self) -> int:
        """Largest magnitude of a symmetric code."""
        return 2 ** (self.bits - 1) - 1


def scale_of(scales: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 scales of their bytes, as :func:`quantize` returns them."""
    if bits == 8:
        return power_of_two(scales.to(torch.int32))
    byte = scales.to(torch.int32)
    return (8 + (byte & 7)).float() * power_of_two((byte >> 3) + (LOWEST - 3))


def _byte_of(scale: torch.Tensor) -> torch.Tensor:
    """The byte of a representable float32 scale."""
    mantissa, exponent = torch.frexp(scale)
    return (((exponent - 1 - LOWEST) << 3) | ((mantissa * 16).to(torch.int32) - 8)).to(torch.uint8)


def _rounded_up(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The smallest float32 of ``bits`` significant bits that is at least ``x > 0``, and at least the lowest scale."""
    mantissa, exponent = torch.frexp(x.clamp(min=2.0**LOWEST))
    return torch.ceil(mantissa * 2**bits) * power_of_two(exponent - bits)


def _power_of_two_exponent(largest: torch.Tensor, limit: int) -> torch.Tensor:
    """Smallest e with largest <= limit * 2^e, int32; 0 for zero."""
    # frexp: largest = m * 2^e with m in [0.5, 1). limit < 2^7, hence the correction by one.
    width = limit.bit_length()
    mantissa, exponent = torch.frexp(largest)
    exponent = exponent - width + (mantissa * 2**width > limit).to(torch.int32)
    return torch.where(largest > 0, exponent, 0).clamp(-126, 126)


def quantize(
    x: torch.Tensor, dim: int, grid: Grid, largest: float = LARGEST_NUMBER
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantise float32 ``x`` with one scale along ``dim``, so that no dequantised number is beyond ``largest``.

    Returns:
        (codes, scales, zeros). With 8 bits codes are int8 and scales int8 exponents; with fewer, codes are uint8 in
        ``[0, 2^bits)`` and scales uint8. Zeros are int8, None for a symmetric grid. Scales and zeros have size 1
        along ``dim``. Rounding is to the nearest, and towards zero beside ``largest``; no code is clipped by more.

    Raises:
        ValueError: if a magnitude is beyond the largest scale (only below 8 bits).
    """
    if grid.bits == 8:
        exponent = _power_of_two_exponent(x.abs().amax(dim, keepdim=True), grid.limit)
        most = _most(power_of_two(exponent), largest).clamp(max=grid.limit)
        codes = _clamped(torch.round(x * power_of_two(-exponent)), most)
        return codes.to(torch.int8), exponent.to(torch.int8), None
    if not grid.zero:
        # A code takes bits - 1 bits without its sign.
        wanted = x.abs().amax(dim, keepdim=True) / grid.limit
        scale = _rounded_up(wanted, min(4, SIGNIFICAND + 1 - grid.bits))
        _check_range(x, scale)
        codes = _clamped(torch.round(x / scale), _most(scale, largest).clamp(max=grid.limit)) + grid.limit
        return codes.to(torch.uint8), _byte_of(scale), None
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = _scale_with_zero(low, high, 2**grid.bits - 1)
    _check_range(x, scale)
    most = _most(scale, largest)
    zero = _clamped(torch.round(low / scale), most)
    # Where the whole group is on one side far from 0 the integers still fit the rule: _scale_with_zero saw to it.
    codes = (_clamped(torch.round(x / scale), most) - zero).clamp(0, 2**grid.bits - 1)
    return codes.to(torch.uint8), _byte_of(scale), zero.to(torch.int8)


def _most(scale: torch.Tensor, largest: float) -> torch.Tensor:
    """The largest integer whose product with ``scale`` is at most ``largest``."""
    return torch.floor(torch.full_like(scale, largest) / scale)


def _clamped(x: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    return torch.minimum(torch.maximum(x, -most), most)


def _check_range(x: torch.Tensor, scale: torch.Tensor) -> None:
    if bool((scale > LARGEST_SCALE).any()):
        raise ValueError(
            f"max|x|={float(x.abs().max()):g}: allowed is a magnitude whose scale is at most {LARGEST_SCALE:g}; "
            "8 bits take any"
        )


def _scale_with_zero(low: torch.Tensor, high: torch.Tensor, steps: int) -> torch.Tensor:
    """The smallest scale with which ``low`` to ``high`` fits ``steps`` steps and every integer keeps the rule."""
    best = torch.full_like(low, torch.inf)
    for significant in range(1, 5):
        # The largest integer that leaves its product with such a scale exact, and fits the signed byte of the zero.
        largest = 127 if significant == 1 else 2 ** (SIGNIFICAND - significant) - 1
        far = torch.maximum(low.abs(), high.abs()) / largest
        scale = _rounded_up(torch.maximum((high - low) / steps, far), significant)
        # round(high / s) - round(low / s) may exceed the steps by one: the next scale up then.
        over = torch.round(high / scale) - torch.round(low / scale) > steps
        scale = torch.where(over, _rounded_up(scale * (1 + 2.0**-6), significant), scale)
        best = torch.minimum(best, scale)
    return best


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, grid: Grid, dtype: torch.dtype
) -> torch.Tensor:
    """``integer * scale`` in ``dtype``; exact in float32 and bfloat16. Arguments as :func:`quantize` returns them."""
    if grid.bits == 8:
        integers = codes.to(torch.float32)
    elif zeros is None:
        integers = codes.to(torch.float32) - grid.limit
    else:
        integers = codes.to(torch.float32) + zeros.to(torch.float32)
    return (integers * scale_of(scales, grid.bits)).to(dtype)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes ``[..., n]`` below ``2^bits`` as uint8 ``[..., n * bits / 8]``, n a multiple of 8.

    Planes of 4, 2 and 1 bits follow one another: 6 bits are a plane of 4 and one of 2.
    """
    planes, shift = [], 0
    for width in (4, 2, 1):
        if bits & width:
            part = (codes >> shift) & (2**width - 1)
            part = part.unflatten(-1, (-1, 8 // width))
            weights = torch.tensor(
                [1 << (width * i) for i in range(8 // width)], dtype=torch.int32, device=codes.device
            )
            planes.append((part.to(torch.int32) * weights).sum(-1).to(torch.uint8))
            shift += width
    return torch.cat(planes, dim=-1)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`pack`."""
    n = packed.shape[-1] * 8 // bits
    out, start, shift = None, 0, 0
    for width in (4, 2, 1):
        if bits & width:
            plane = packed[..., start : start + n * width // 8]
            shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
            part = ((plane[..., None] >> shifts) & (2**width - 1)).flatten(-2) << shift
            out = part if out is None else out | part
            start, shift = start + n * width // 8, shift + width
    assert out is not None
    return out

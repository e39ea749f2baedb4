"""Checks of what a prefill is told beside tensors: padding, windows, logits, keys that are always kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real

import torch

from ..attention.always import Always
from ..attention.logits import Logits
from ..budget import Budget
from ..validation import check_form, check_memory, check_scale, is_integer, require
from .plan import NO_WINDOW


def as_pads(pads: torch.Tensor | Sequence[int] | None, q: torch.Tensor, n: int) -> torch.Tensor | None:
    """``pads`` as int32 ``[B]`` on q's device, contiguous.

    Raises:
        ValueError: for another type, dtype, shape or device; integers that are not in 0..n, if they are no tensor's.
    """
    if pads is None:
        return None
    batch = q.shape[0]
    if isinstance(pads, torch.Tensor):
        check_memory("pads", pads)
        require(pads.dtype in (torch.int32, torch.int64), "pads.dtype", pads.dtype, "int32 or int64")
        require(pads.shape == (batch,), "pads.shape", tuple(pads.shape), f"({batch},), one number a batch row")
        require(pads.device == q.device, "pads.device", str(pads.device), f"q's device {q.device}")
        # Where they are cut off before int64 numbers would lose their upper half.
        return pads.clamp(0, n).to(torch.int32).contiguous()
    is_list = isinstance(pads, Sequence) and not isinstance(pads, str)
    require(is_list, "pads", pads, f"a tensor or {batch} integers in 0..{n}")
    fits = len(pads) == batch and all(is_integer(x) and 0 <= x <= n for x in pads)
    require(fits, "pads", pads, f"{batch} integers in 0..{n}")
    return torch.tensor(list(pads), dtype=torch.int32, device=q.device)


def window_of(window: int | None) -> int:
    """How many keys a query sees at most.

    Raises:
        ValueError: for other than None and an integer of at least 1.
    """
    if window is None:
        return NO_WINDOW
    require(is_integer(window) and window >= 1, "window", window, "None or an integer of at least 1")
    return min(window, NO_WINDOW)


def check_always(always: Always, budget: Budget) -> None:
    """Check that keys always kept are a number that the budget has room for.

    Raises:
        ValueError: naming what is not allowed.
    """
    require(isinstance(always, Always), "always", always, "a qaxis.attention.always.Always")
    for name, x in zip(always._fields, always, strict=True):
        require(is_integer(x) and x >= 0, f"always.{name}", x, "an integer of at least 0")
    kept = always.sinks + always.recent
    require(kept <= budget.minimum, "always", tuple(always), f"no more keys than the budget's minimum {budget.minimum}")


def check_logits(logits: Logits | None, scale: float | None, q: torch.Tensor) -> Logits:
    """The logits of a prefill: ``logits``, or those of a ``scale``.

    Raises:
        ValueError: if both are given, or naming what is not allowed.
    """
    if logits is None:
        return Logits(check_scale(scale, q.shape[3]))
    require(isinstance(logits, Logits), "logits", logits, "a qaxis.attention.logits.Logits or None")
    require(scale is None, "scale", scale, "None beside logits, which have a scale")
    logits = replace(logits, scale=check_scale(logits.scale, q.shape[3]))
    cap, sink = logits.soft_cap, logits.sink
    real = isinstance(cap, Real) and not isinstance(cap, bool)
    require(cap is None or (real and 1e-30 <= cap <= 1e30), "logits.soft_cap", cap, "None or a number in [1e-30, 1e30]")
    if sink is not None:
        check_form("logits.sink", sink, 1)
        require(sink.shape[0] == q.shape[1], "logits.sink.shape", tuple(sink.shape), f"({q.shape[1]},), one a head")
        require(sink.device == q.device, "logits.sink.device", str(sink.device), f"q's device {q.device}")
        sink = sink.contiguous()
    return replace(logits, sink=sink)

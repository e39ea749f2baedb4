"""Checks of what a prefill alone is told beside tensors: padding, windows, what is put back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..attention.always import NONE, Always
from ..attention.completion import kind_of
from ..budget import Budget
from ..validation import check_memory, is_integer, require
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


def completion_of(completion: str, offset: int, budget: Budget, always: Always) -> str:
    """The kind of a completion, once what it needs is there.

    Raises:
        ValueError: for an unknown kind, an offset that is no integer of at least 0, or a budget without room for one
            key beside those always kept, which tells how high the scores of all others are.
    """
    kind = kind_of(completion)
    require(is_integer(offset) and offset >= 0, "offset", offset, "an integer of at least 0")
    require(
        kind == "none" or always == NONE or sum(always) < budget.minimum, "always", always,
        f"fewer keys together than the budget's minimum {budget.minimum}: completion={completion!r} needs one that is "
        "kept by its score",
    )  # fmt: skip
    return kind

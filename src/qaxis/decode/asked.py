"""What a step is asked beside queries, keys and values: rows, keys that are always kept, logits. Checked by form."""

from __future__ import annotations

import math

import torch

from ..attention.always import Always
from ..attention.logits import Logits
from ..storage.side import Stored
from ..validation import check_form, check_memory, check_scale, is_integer, require
from .form import MadeFor

#: soft caps are normal float32 numbers, so that no backend flushes them to 0
LEAST_CAP, MOST_CAP = 2.0**-126, 2.0**127


def check_rows(rows: torch.Tensor, made_for: MadeFor) -> None:
    """Check that ``rows`` are int32 ``[B, 4]``, contiguous, where the step is; the numbers stay on the device.

    Raises:
        ValueError: naming ``rows``, what of them does not fit, and what is allowed.
    """
    require(isinstance(rows, torch.Tensor), "rows", type(rows).__name__, "a torch.Tensor")
    check_memory("rows", rows)
    require(tuple(rows.shape) == (made_for.batch, 4), "rows.shape", tuple(rows.shape), f"{(made_for.batch, 4)}")
    require(rows.dtype == torch.int32, "rows.dtype", rows.dtype, "torch.int32")
    require(rows.device == made_for.device, "rows.device", str(rows.device), f"{made_for.device}")
    require(rows.is_contiguous(), "rows.stride()", rows.stride(), "(4, 1): contiguous rows")


def check_always(always: Always, made_for: MadeFor) -> None:
    """Check that as many keys may be kept as there are sinks and recent ones.

    Raises:
        ValueError: naming ``always``, its value and what is allowed.
    """
    require(isinstance(always, Always), "always", always, "an Always")
    for name, size in always._asdict().items():
        require(is_integer(size) and size >= 0, f"always.{name}", size, "an integer of at least 0")
    kept = min(sum(always), made_for.n)
    require(kept <= made_for.k_eff, "always", always, f"at most {made_for.k_eff} keys, as k_eff counts them")


def check_whole_groups(name: str, x: object) -> None:
    """Check that all whole groups of a cache have codes: kernels tell from its length where codes end.

    Raises:
        ValueError: naming the part.
    """
    if isinstance(x, Stored):
        whole = x.length - x.length % x.grid.tokens
        require(x.codes.shape[2] == whole, f"{name}.codes.shape", tuple(x.codes.shape), f"{whole} of {x.length} tokens")


def logits_of(logits: Logits | None, scale: float | None, made_for: MadeFor) -> Logits:
    """``logits``, or those of ``scale`` alone, whose form is checked.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    if logits is None:
        return Logits(check_scale(scale, made_for.head_dim))
    require(isinstance(logits, Logits), "logits", type(logits).__name__, "a Logits")
    require(scale is None, "scale", scale, "None beside logits, which have a scale")
    check_scale(logits.scale, made_for.head_dim)
    cap, sink = logits.soft_cap, logits.sink
    real = isinstance(cap, (int, float)) and not isinstance(cap, bool) and math.isfinite(cap)
    allowed = cap is None or (real and LEAST_CAP <= cap <= MOST_CAP)
    require(allowed, "logits.soft_cap", cap, f"None, or a number in {LEAST_CAP:g}..{MOST_CAP:g}")
    if sink is not None:
        check_form("logits.sink", sink, 1)
        heads, device = made_for.heads, made_for.device
        require(sink.shape[0] == heads, "logits.sink.shape", tuple(sink.shape), f"({heads},): one a head")
        require(sink.device == device, "logits.sink.device", str(sink.device), f"{device}")
    return logits

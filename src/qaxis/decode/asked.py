"""What a step is asked beside queries, keys and values: rows, keys that are always kept, logits. Checked by form."""

from __future__ import annotations

import torch

from ..attention.always import Always, check_always
from ..attention.completion import kind_of
from ..attention.logits import Logits, checked_logits
from ..storage.moments import Moments
from ..storage.side import Stored
from ..validation import MOST_KEYS, check_memory, require
from .form import MadeFor

#: with completion: complete.cuh divides it by 256, exactly
LEAST_SCALE = 2.0**-110


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


def check_kept(always: Always, made_for: MadeFor) -> None:
    """Check that as many keys may be kept as there are sinks and recent ones.

    Raises:
        ValueError: naming ``always``, its value and what is allowed.
    """
    # Where every key may be kept any number of them is a bound.
    check_always(always, made_for.k_eff if made_for.k_eff < made_for.n else MOST_KEYS, "k_eff")


def check_completion(
    completion: str, moments: Moments | None, kv_heads: int, dim_v: int, always: Always, logits: Logits,
    made_for: MadeFor,
) -> str:  # fmt: skip
    """Check what a completed step is given beside, by form, or that one that is not gets no moments.

    Returns:
        ``"none"``, ``"mean"`` or ``"linear"``.

    Raises:
        ValueError: naming ``completion``, ``moments`` or a part of them, ``always`` or ``logits.scale``, its value and
            what is allowed.
    """
    kind = kind_of(completion)
    if kind == "none":
        require(moments is None, "moments", type(moments).__name__, "None without completion")
        return kind
    require(isinstance(moments, Moments), "moments", type(moments).__name__, "qaxis.storage.moments.Moments")
    assert moments is not None
    dim, head = made_for.head_dim, (made_for.batch, kv_heads)
    shapes = {"products": (*head, dim_v + dim, dim), "sums": (*head, dim_v + dim)}
    for part, shape in shapes.items():
        name, x = f"moments.{part}", getattr(moments, part)
        require(isinstance(x, torch.Tensor), name, type(x).__name__, "a torch.Tensor")
        check_memory(name, x)
        require(tuple(x.shape) == shape, f"{name}.shape", tuple(x.shape), f"{shape}")
        require(x.dtype == torch.float32, f"{name}.dtype", x.dtype, "torch.float32")
        require(x.device == made_for.device, f"{name}.device", str(x.device), f"{made_for.device}")
        # Read by 16 bytes.
        lies = x.is_contiguous() and x.data_ptr() % 16 == 0
        require(lies, f"{name}.stride()", x.stride(), "a contiguous tensor that begins at 16 bytes")
    # What is left out is no better than what is ranked: some key has to be.
    ranked = made_for.k_eff if made_for.k_eff < made_for.n else MOST_KEYS
    require(sum(always) < ranked, "always", always, f"fewer than k_eff={ranked} keys together with completion")
    require(logits.scale >= LEAST_SCALE, "logits.scale", logits.scale, f"at least {LEAST_SCALE:g} with completion")
    return kind


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
    return checked_logits(logits, scale, made_for.heads, made_for.head_dim, made_for.device)

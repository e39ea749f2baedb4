"""Attention of a prompt, or of a chunk of one, by selection-exact prefill on matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..attention.logits import Logits
from .attended import DENSE, NO_GPU, NO_RANGE, REFERENCE, TOLERANCE, Attended, Refusal
from .holding import HOLDER
from .masks import Shown
from .settings import Settings

BITWISE = Refusal("exactness='bitwise'", asked=True)


def refusal(q: torch.Tensor, shown: Shown | None, settings: Settings) -> Refusal | None:
    """Why prefill on matrix products is not what is wanted, or cannot be; None if it is."""
    if settings.budget is None:
        return DENSE
    if settings.budget.tolerance is not None:
        return TOLERANCE
    if settings.exactness == "bitwise":
        return BITWISE
    if settings.backend == "reference":
        return REFERENCE
    if q.device.type == "cpu" and "auto" in (settings.backend, settings.exactness):
        return NO_GPU
    return NO_RANGE if shown is None else None


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shown: Shown, logits: Logits, settings: Settings, watched: bool,
    dropped: Callable[[], int],
) -> Attended:  # fmt: skip
    """Attention of queries ``[B, H, M, D]``, the last of the N keys, that :func:`refusal` does not refuse.

    Args:
        k: ``[B, Hkv, N, D]``. v: ``[B, Hkv, N, Dv]``.
        watched: whether the mask of kept keys will be asked for.
        dropped: how many tokens came before the first key; asked for a completion alone.
    """
    # Triton, for Linux only, is loaded when it is needed.
    from ..prefill import prefill_attention, selected_mask, tuning_for

    assert settings.budget is not None
    n, holder = k.shape[2], getattr(k, HOLDER, None)
    room = 0 if holder is None else max(layer.room for layer in holder.shared.holders)
    done = prefill_attention(
        q, k, v, settings.budget, pads=shown.pads, window=shown.window, logits=logits, always=settings.always,
        selection=watched, backend="triton" if settings.backend == "triton" else "auto",
        tuning=tuning_for(q.shape[0], q.shape[1], q.shape[2], n, room), completion=settings.completion,
        offset=0 if settings.completion == "none" else dropped(),
    )  # fmt: skip
    bits = done.bits
    return Attended(done.output, None if bits is None else lambda: selected_mask(bits, n), "prefill")

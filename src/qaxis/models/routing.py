"""What computes an attention call: the decode step, prefill, canonical attention, or dense products, in this order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..attention import backend
from ..attention.completed import Kept
from ..attention.completion import Seen, seen_of
from ..attention.logits import Logits
from ..attention.selection import indices_to_mask
from ..storage.lazy import dequantized, stored_or_tensor
from ..storage.moments import GROUP
from ..storage.side import Stored
from ..storage.summary import first_groups
from . import decoding, masked, prompts
from .attended import Attended, Refusal
from .holding import HOLDER
from .masks import Shown
from .settings import Settings


class _Thread(threading.local):
    """Whether this thread attends by nothing but steps over a cache of ours."""

    only_steps = False


_thread = _Thread()


@contextmanager
def only_steps() -> Iterator[None]:
    """Inside, attention that a captured step could not repeat for the next token raises RuntimeError."""
    _thread.only_steps = True
    try:
        yield
    finally:
        _thread.only_steps = False


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shown: Shown | None,
    allowed: Callable[[], torch.Tensor],
    logits: Logits,
    settings: Settings,
    watched: bool = False,
    dropped: Callable[[], int] = lambda: 0,
) -> Attended:
    """Attention by the fastest of what may compute it.

    Args:
        q: ``[B, H, M, D]``. k: ``[B, Hkv, N, D]``. v: ``[B, Hkv, N, Dv]``.
        shown: what the queries see, in a few numbers; None: only ``allowed()`` tells, bool ``[B|1, H|1, M|1, N]``.
        watched: whether the mask of kept keys will be asked for.
        dropped: how many tokens came before the first key; asked for a completion alone.

    Raises:
        RuntimeError: inside :func:`only_steps`, for what is no step over a cache of ours.
        ValueError: if there is a completion, and what a query sees is no range of keys.
    """
    no_step = decoding.refusal(q, k, v, shown, logits, settings)
    if _thread.only_steps:
        why = no_step or decoding.not_repeatable(k, shown)
        if why:
            raise RuntimeError(f"attention of a layer is no step that can be repeated: {why}")
    if no_step is None:
        assert shown is not None
        return decoding.attend(q, k, v, shown, logits, settings)
    if no_step.canonical:
        return _canonical(q, k, v, allowed(), logits, settings, dropped)._replace(refusals=(no_step,))
    no_prompt = prompts.refusal(q, shown, settings)
    if no_prompt is None:
        assert shown is not None
        done = prompts.attend(q, _numbers(k), _numbers(v), shown, logits, settings, watched, dropped)
        return done._replace(refusals=(no_step,)) if q.shape[2] == 1 else done
    if settings.budget is None:
        return Attended(masked.dense(q, _numbers(k), _numbers(v), shown, allowed, logits, settings), None, "dense")
    refusals = _both(q.shape[2], no_step, no_prompt)
    if settings.exactness == "selection":
        offset = 0 if settings.completion == "none" else dropped()
        out, kept = masked.masked(q, _numbers(k), _numbers(v), allowed(), logits, settings, watched, offset)
        return Attended(out, kept, "masked", refusals)
    return _canonical(q, k, v, allowed(), logits, settings, dropped)._replace(refusals=refusals)


def _both(queries: int, no_step: Refusal, no_prompt: Refusal) -> tuple[Refusal, ...]:
    """What of two refusals explains the way that so many queries went, each once."""
    if queries == 1:
        return (no_step,)
    if queries > decoding.MOST_QUERIES:
        return (no_prompt,)
    return tuple(dict.fromkeys((no_step, no_prompt)))


def _numbers(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its numbers there, whether it was a tensor or stands for a side of a cache."""
    found = stored_or_tensor(x)
    return dequantized(found) if isinstance(found, Stored) else found


def _canonical(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, logits: Logits, settings: Settings,
    dropped: Callable[[], int],
) -> Attended:  # fmt: skip
    """Selection and canonical sums by the kernels of any query, which read a cache as it is stored."""
    assert settings.budget is not None
    keys, values, n = stored_or_tensor(k), stored_or_tensor(v), k.shape[2]
    name = "auto" if settings.backend == "cuda" else settings.backend
    k_eff = backend.keys_of(settings.budget, q, keys, allowed, logits)
    indices = backend.select(q, keys, allowed, k_eff, backend=name, always=settings.always)
    completing: dict[str, Any] = {}
    if settings.completion != "none":
        seen = seen_of(allowed, dropped())
        completing = {"completion": settings.completion, "seen": seen, "kept": _kept(q, k, v, seen)}
    out = backend.attend(q, keys, values, indices, logits, backend=name, **completing)
    return Attended(out, lambda: indices_to_mask(indices, n), "canonical")


def _kept(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen) -> Kept | None:
    """Moments that the cache of a few tokens keeps, of the complete groups from where the newest begins to see.

    None where none are kept, and for a prompt, which sums each group once for all of its queries.
    """
    holder: Any = getattr(k, HOLDER, None)
    in_place = holder is not None and getattr(v, HOLDER, None) is holder
    if not in_place or holder.window or q.shape[2] > decoding.MOST_QUERIES:
        return None
    pads = seen.begin.expand(q.shape[:3])[:, 0, -1].int().contiguous()
    return Kept(holder.moments(pads), [(first, holder.length // GROUP) for first in first_groups(pads).tolist()])

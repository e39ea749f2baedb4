"""Triton: where the tokens of a sliding window lie, as ``window.py`` says."""

from __future__ import annotations

from ..arithmetic.triton import jit, tl


@jit
def first_held(end, window, places):
    """The token at place 0 when the buffer holds the tokens up to ``end``; as :func:`qaxis.storage.window.first_held`.

    Division rounds towards 0 here, not down: what it divides must not be negative.
    """
    step = places - window + 1
    return tl.where(end <= places, 0, step + (tl.maximum(end - 1 - places, 0) // step) * step)

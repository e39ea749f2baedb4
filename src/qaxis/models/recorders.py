"""Who is shown attention calls, and what they see of each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..attention.logits import Logits


@dataclass
class Call:
    """One attention call, as recorders see it."""

    module: nn.Module
    layer: int
    #: ``[B, H, M, D]``
    query: torch.Tensor
    #: ``[B, Hkv, N, D]``
    key: torch.Tensor
    #: bool ``[B|1, H|1, M|1, N]``
    allowed: torch.Tensor
    logits: Logits
    #: bool ``[B, H, M, N]``; None where every allowed key takes part
    kept: torch.Tensor | None
    #: what computed it, and why nothing faster did: empty where nothing is
    engine: str
    reason: str


Recorder = Callable[[Call], None]

_lock = threading.Lock()
#: replaced as a whole: another thread may be going through it
_recorders: tuple[Recorder, ...] = ()


def add(recorder: Recorder) -> None:
    """``recorder`` is called with every attention call of every thread from now on, after those before it."""
    global _recorders
    with _lock:
        _recorders = (*_recorders, recorder)


def remove(recorder: Recorder) -> None:
    """``recorder`` is called no more; calls that are under way may still reach it.

    Raises:
        ValueError: for one that was not added.
    """
    global _recorders
    with _lock:
        at = _recorders.index(recorder)
        _recorders = (*_recorders[:at], *_recorders[at + 1 :])


def current() -> tuple[Recorder, ...]:
    """Those that are called, in order; empty while nobody records."""
    return _recorders

"""The CUDA C++ of the certified decode step, run on a CPU thread by thread, against the canonical reference."""

from __future__ import annotations

import itertools

import torch

from qaxis.cuda import emulator
from qaxis.decode import Decoder

from ..harness.claim import Context, NotRunError, Result
from .certified import KINDS, attacked


def emulated(context: Context) -> Result:
    """Indices and output bits of the CUDA kernels, compiled for this CPU, on random and adversarial rows."""
    if not emulator.available():
        raise NotRunError("g++ is not on the PATH; install it (Debian, Ubuntu: apt install g++)")
    # Clusters of eight, of four, one program a row; the second has lists that overflow.
    shapes = [
        ((1, 3, 1, 900, 64), 100), ((1, 1, 1, 12000, 64), 16), ((4, 8, 2, 1500, 64), 150), ((17, 8, 4, 600, 64), 16),
        ((1, 8, 2, 3000, 128), 200),
    ]  # fmt: skip
    kinds = (*KINDS[::4], "near ties", "ties at the edge", "one direction") if context.quick else KINDS
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    plan = [
        (kind, shape, wanted, dtype)
        for kind, (shape, wanted) in itertools.product(kinds, shapes[:2] if context.quick else shapes)
        # Each variant has to be compiled: other dtypes in one shape.
        for dtype in (dtypes if shape == shapes[0][0] else dtypes[:1])
    ]
    return attacked(context, plan, {"CUDA": Decoder})

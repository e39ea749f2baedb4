"""The CUDA C++ of the certified decode step, run on a CPU thread by thread, against the canonical reference."""

from __future__ import annotations

from qaxis.cuda import emulator

from ..harness.claim import Context, NotRunError, Result
from ..inputs.adversarial import FAST
from . import doors
from .certified import WIDE, Attack, attacked, result

#: clusters of eight programs a row; lists that overflow; longer keys
SHAPES = (((1, 3, 1, 900, 64), 100), ((1, 1, 1, 12000, 64), 16), ((1, 2, 1, 3000, 128), 200))
#: many rows, which take long: clusters of four for one kind, one program a row for the next
MANY_ROWS = (((3, 8, 2, 1100, 64), 110), ((9, 8, 4, 600, 64), 16))


def emulated(context: Context) -> Result:
    """Indices and output bits of the CUDA kernels, compiled for this CPU, on random and adversarial rows."""
    if not emulator.available():
        raise NotRunError("g++ is not on the PATH; install it (Debian, Ubuntu: apt install g++)")
    kinds = (*FAST[::4], "near ties in the type", "ties at the edge", "one direction") if context.quick else FAST
    plan = []
    for i, kind in enumerate(kinds):
        # Each variant has to be compiled: other dtypes in one shape.
        plan += [Attack(kind, *SHAPES[0], dtype) for dtype in WIDE]
        others = SHAPES[1:2] if context.quick else (*SHAPES[1:], MANY_ROWS[i % 2])
        plan += [Attack(kind, *shape, WIDE[0]) for shape in others]
    steps = {"CUDA": doors.STEPS["CUDA"]}
    entries = doors.decoders(steps, (2, 2, 2, 1, 70, 64), context.device)
    return result(attacked(context, plan, steps), doors.tried(entries, context.device, context.seed))

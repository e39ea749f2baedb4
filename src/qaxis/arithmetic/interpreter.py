"""Chooses Triton's interpreter where there is no GPU, whether or not somebody has loaded Triton.

Triton decides when it is loaded how its own functions (tl.sum and others) run, and transformers loads it: this is
therefore the first module that ``import qaxis`` runs, and what was loaded before is decided anew. What the user set
stays: Triton reads 1, true, yes, on and y, in any case, as on and anything else as off; the reference computes either
way.
"""

from __future__ import annotations

import os
import sys

import torch


def _interpret_what_is_loaded() -> None:
    """Makes Triton's own functions, where they were defined to be compiled, functions that are interpreted.

    Without a GPU the compiled ones could not have run.
    """
    import triton

    if not triton.knobs.runtime.interpret:
        return
    # Of a list, as other threads may import meanwhile.
    loaded = list(sys.modules.items())
    holders: list[object] = [module for name, module in loaded if name.split(".")[:2] == ["triton", "language"]]
    holders.append(triton.language.tensor)  # x.sum(0) is tl.sum(x, 0)
    made: dict[int, object] = {}
    for holder in holders:
        for name, function in list(vars(holder).items()):
            if isinstance(function, triton.JITFunction):
                setattr(holder, name, made.setdefault(id(function), triton.jit(function.fn)))


if not torch.cuda.is_available():
    if not os.environ.get("TRITON_INTERPRET"):
        os.environ["TRITON_INTERPRET"] = "1"
    if "triton.language" in sys.modules:
        _interpret_what_is_loaded()

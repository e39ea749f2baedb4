"""Every public entry: any layout of its tensors gives the same result, and what does not fit is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch

import qaxis
from qaxis import decode
from qaxis.decode import KeyIndex, index_keys
from qaxis.decode.triton_step import TritonStep
from qaxis.prefill import PrefillTuning, prefill_attention, selected_positions

from ..inputs.adversarial import make
from ..inputs.layouts import LAYOUTS, MALFORMED, MALFORMED_INDEX, MALFORMED_SHAPE, Malformed

#: indices and output of q, k and v, and of an index where the entry takes one
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor]]
BUDGET = 9
#: relative distance of an output that is not canonical from one that is, as tensor cores round their sums
NEAR = 2.0**-5


@dataclass(frozen=True)
class Door:
    """One public entry.

    Attributes:
        shape: (B, H, Hkv, M, N, D) it is tried with.
        indexed: whether it takes an index of the keys, and was made for one shape.
        exact: whether its output has the bits of the reference, not its indices alone.
    """

    name: str
    call: Call
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    indexed: bool = False
    exact: bool = True


class Findings(NamedTuple):
    """Names of what was tried, and what was wrong in words."""

    checks: list[str]
    wrong: list[str]


def decoders(makers: dict[str, Callable[..., Any]], shape: tuple[int, ...], device: str) -> Iterator[Door]:
    """A decode step of each maker; one object for all layouts, as what it has seen may not change what it does."""
    for name, maker in makers.items():
        batch, heads, _, _, n, dim = shape
        made = maker(batch, heads, n, dim, BUDGET, device)

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: Any, made: Any = made) -> Any:
            return made(q, k, v, index)[1::-1]

        yield Door(f"decode, {name}", call, shape, indexed=True)


STEPS: dict[str, Callable[..., Any]] = {"Triton": TritonStep, "CUDA": decode.Decoder}


def topk(backends: Sequence[str]) -> Iterator[Door]:
    """``qaxis.topk_attention``."""
    for backend in backends:

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Any, backend: str = backend) -> Any:
            return qaxis.topk_attention(q, k, v, BUDGET, backend=backend)[::-1]

        yield Door(f"topk_attention, {backend}", call, (2, 2, 2, 1, 70, 32))


def prefills(backends: Sequence[str], device: str) -> Iterator[Door]:
    """``qaxis.prefill.prefill_attention``; in the interpreter few programs, as each takes its time."""
    tuning = PrefillTuning(wide_programs=4) if device == "cpu" else PrefillTuning()
    for backend in backends:

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Any, backend: str = backend) -> Any:
            out = prefill_attention(q, k, v, BUDGET, selection=True, backend=backend, tuning=tuning)
            return selected_positions(cast(torch.Tensor, out.bits)), out.output

        yield Door(f"prefill_attention, {backend}", call, (2, 2, 2, 2, 70, 32), exact=False)


def tried(doors: Iterable[Door], device: str, seed: int) -> Findings:
    """Every door with every layout, then with everything that does not fit."""
    checks: list[str] = []
    wrong: list[str] = []
    for door in doors:
        q, k, v = (x.to(device) for x in make("normal", door.shape, door.dtype, seed))
        for what, problem in [*_laid_out(door, q, k, v), *_refused(door, q, k, v)]:
            checks.append(f"{door.name}: {what}")
            wrong += [f"{checks[-1]}: {problem}"] if problem else []
    return Findings(checks, wrong)


def _laid_out(door: Door, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[str, str]]:
    """(layout, what is wrong with it or "")."""
    for name, layout in LAYOUTS.items():
        a, b, c = (layout(x) for x in (q, k, v))
        right = qaxis.topk_attention(a.contiguous(), b.contiguous(), c.contiguous(), BUDGET, backend="reference")
        try:
            indices, output = door.call(a, b, c, index_keys(b) if door.indexed else None)
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}"[:200]
            continue
        if not torch.equal(indices, right.indices):
            yield name, "other indices"
        elif door.exact:
            yield name, "" if torch.equal(output, right.output) else "other bits of the output"
        else:
            off = (output.float() - right.output.float()).abs().max() / v.float().abs().max()
            yield name, "" if float(off) <= NEAR else f"output off by {float(off):.1e}"


def _refused(door: Door, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[str, str]]:
    """(what does not fit, what is wrong with how it was met or "")."""
    index: KeyIndex | None = index_keys(k) if door.indexed else None
    kinds: dict[str, Malformed] = {**MALFORMED, **(MALFORMED_SHAPE if door.indexed else {})}
    for name, (change, allowed) in kinds.items():
        yield name, _problem(partial(door.call, *change(q, k, v), index), allowed)
    for name, other in MALFORMED_INDEX.items() if door.indexed else ():
        yield f"index {name}", _problem(partial(door.call, q, k, v, other(k)), "i")


def _problem(call: Callable[[], object], allowed: str) -> str:
    """ "" if the call is refused with a ValueError that names one of the arguments, given by their first letters."""
    try:
        call()
    except ValueError as error:
        named = re.match(r"(q|k|v|index)\b[^=]*=", str(error))
        return "" if named and named[1][0] in allowed else f"refused, but not by name: {error}"[:200]
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "not refused"


def said(wrong: Sequence[str]) -> str:
    """The first few of what is wrong, and how many more."""
    return "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")

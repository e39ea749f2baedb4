"""What top-k leaves out, put back: the bits of an independent witness and of the decode step, prompts near them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch

import qaxis
from qaxis.arithmetic import reference as canonical
from qaxis.attention import backend as door
from qaxis.attention.completion import Seen, completed_weights, seen_of
from qaxis.attention.logits import Logits
from qaxis.attention.selection import causal_mask, indices_to_mask
from qaxis.cuda import emulator
from qaxis.decode import Decoder, KeyIndex, places
from qaxis.decode.cuda import CudaStep
from qaxis.prefill import Prefill, PrefillTuning, prefill_attention, selected_positions
from qaxis.storage.moments import GROUP, Moments, add_groups, empty
from qaxis.storage.side import Stored

from ..harness.claim import Context, Result, value
from ..inputs import witness
from ..inputs.adversarial import KINDS, make
from ..inputs.seeded import DTYPES
from .certified import stored, ways
from .golden import first_difference
from .prefill import ALLOWED, INTERPRETED

COMPLETIONS = ("mean", "linear")
#: (B, H, Hkv, M, N, D) that NumPy recomputes: rows of several groups, a prompt that passes from none to one and to two
SHAPES = ((1, 4, 2, 1, 300, 32), (2, 3, 1, 2, 517, 64), (1, 2, 2, 40, 144, 32), (1, 1, 1, 3, 258, 80))
#: with nine tenths kept, runs of which nothing or one key is left; the fourth leaves nothing out
BUDGETS = (
    qaxis.Budget(0.1, 5), qaxis.Budget(0.5, 1), qaxis.Budget(0, 33), qaxis.Budget(1.0, 1), qaxis.Budget(0.9, 1)
)  # fmt: skip
#: kinds whose keys a prompt tells apart as well: where all scores are equal but for rounding there is a slope or none
APART = ("normal", "wide range", "one dominates", "sink", "outlier channel", "outlier key", "coarse scales")


class Stepped(NamedTuple):
    """Decode steps on a GPU of one shape (B, H, Hkv, M, N, D), and a type of which a few kinds are tried beside."""

    shape: tuple[int, ...]
    k_eff: int
    beside: torch.dtype | None = None


#: clusters of two programs a row; of one, of the most query heads a key head that there may be; of eight; and of four,
#: with more runs of keys than threads, as of long texts
STEPPED = (
    Stepped((8, 8, 2, 1, 2000, 64), 200, torch.float32), Stepped((9, 8, 1, 1, 9001, 128), 900, torch.float16),
    Stepped((1, 9, 3, 1, 4097, 64), 64), Stepped((1, 20, 5, 1, 33001, 128), 1000),
)  # fmt: skip
#: kinds that are other numbers in another type
OF_THE_TYPE = ("near ties in the type", "subnormal", "edge of overflow")


class Beside(NamedTuple):
    """What a layer may have beside tensors: hidden first keys, a window, tokens before the first key, other logits."""

    name: str
    pads: tuple[int, int] = (0, 0)
    window: int = 0
    offset: int = 0
    cap: float | None = None
    sink: bool = False


BESIDE = (
    Beside("padding", pads=(130, 3)), Beside("padding of a group", pads=(128, 127)),
    Beside("all but few hidden", pads=(500, 516)), Beside("window", window=300),
    Beside("window of less than a group", window=100), Beside("window, earlier tokens dropped", window=290, offset=77),
    Beside("tokens before", offset=200), Beside("soft cap", cap=30.0), Beside("sink", sink=True),
    Beside("everything", pads=(5, 140), window=400, offset=19, cap=20.0, sink=True),
)  # fmt: skip


@dataclass
class Tally:
    """What was compared and what was wrong."""

    #: queries whose bits are held to the witness's or to the reference's, by what computed them
    rows: dict[str, int] = field(default_factory=dict)
    differ: int = 0
    #: rows without a completion that are held to those of a call that names none
    off: int = 0
    off_differ: int = 0
    #: largest distance of an output, of what is allowed
    worst: float = 0.0
    near: int = 0
    wrong: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def bits(self, name: str, by: str, got: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> None:
        """Tensors ``[B, H, M, ...]`` that are to be equal bit for bit: indices and outputs."""
        rows = right[0][..., 0].numel()
        self.names.append(f"{name}, {by}")
        self.rows[by] = self.rows.get(by, 0) + rows
        for a, b in zip(got, right, strict=True):
            said = _unequal(a, b)
            if said:
                self.differ += rows
                self.wrong.append(f"{name}, {by}: {said}")
                return

    def stays(self, name: str, got: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> None:
        """The same where nothing is put back."""
        rows = right[0][..., 0].numel()
        self.names.append(f"{name}, off")
        self.off += rows
        said = next((s for a, b in zip(got, right, strict=True) if (s := _unequal(a, b))), "")
        if said:
            self.off_differ += rows
            self.wrong.append(f"{name}, off: {said}")

    def close(self, name: str, by: str, got: torch.Tensor, right: torch.Tensor, v: torch.Tensor) -> None:
        """Outputs that are not canonical."""
        off = float((got.float() - right.float()).abs().max() / v.float().abs().max()) / ALLOWED[right.dtype]
        self.names.append(f"{name}, {by}")
        self.near, self.worst = self.near + right[..., 0].numel(), max(self.worst, off)
        if not off <= 1:
            self.wrong.append(f"{name}, {by}: output off by {off:.2f} of what is allowed")


def _unequal(a: torch.Tensor, b: torch.Tensor) -> str:
    """Where the bits of two tensors differ, in words; empty if nowhere."""
    a, b = a.cpu(), b.cpu()
    if a.shape == b.shape:
        same = torch.equal(a.float().view(torch.int32), b.float().view(torch.int32)) if a.is_floating_point() else None
        if torch.equal(a, b) if same is None else same:
            return ""
    return first_difference(a, b)


def _named(kind: str, shape: tuple[int, ...], dtype: torch.dtype, completion: str) -> str:
    b, h, kv, m, n, d = shape
    return f"{kind}, {str(dtype)[6:]}, B{b} H{h}/{kv} M{m} N{n} D{d}, {completion}"


def summed(k: torch.Tensor, v: torch.Tensor) -> Moments:
    """Moments of all complete groups of keys ``[B, Hkv, N, D]`` and their values."""
    return add_groups(empty(k, v), k, v, 0, k.shape[2] // GROUP)


def agreement(context: Context) -> Result:
    """Every way to put back what is left out, against NumPy or against ``topk_attention``."""
    tally = Tally()
    _witnessed(context, tally)
    _beside(context, tally)
    _quantised(context, tally)
    _stepped(context, tally)
    _prompted(context, tally)
    rows = sum(tally.rows.values())
    return Result(
        passed=not tally.wrong,
        verdict=tally.wrong[0] if tally.wrong else "the witness's bits; nothing changes where it is off",
        headline=f"{tally.differ} of {rows} queries differ, {tally.off_differ} of {tally.off} where it is off; prompts "
        f"off by at most {tally.worst:.2f} of what is allowed",
        values={
            "rows": value(rows, "queries"),
            "differing": value(tally.differ, "queries", n=rows),
            **{f"rows_{by}": value(n, "queries") for by, n in tally.rows.items()},
            "off": value(tally.off_differ, "queries", n=tally.off),
            "near": value(tally.near, "queries"),
            "worst": value(tally.worst, "of what is allowed", n=tally.near),
        },
        cases=len(tally.names),
        data={"wrong": tally.wrong},
        checks=tally.names,
    )


def _witnessed(context: Context, tally: Tally) -> None:
    """``topk_attention`` against NumPy, every kind of data, dtype and shape; and what it is without a completion."""
    small = context.device == "cpu"
    # Where scores are equal but for rounding there is no slope.
    kinds = (*tuple(KINDS)[::4], "near ties in the type", "one direction") if context.quick else tuple(KINDS)
    # One shape, dtype and budget a kind and completion, each in turn: three times where nothing else is computed.
    plan = list(itertools.product(range(len(kinds)), range(3 if small else 1), range(2)))
    for i, j, c in context.progress(plan, "completed rows"):
        shape, dtype = SHAPES[(i + j) % len(SHAPES)], DTYPES[(i + 2 * j) % 3]
        budget, completion, kind = BUDGETS[(i + j + c) % len(BUDGETS)], COMPLETIONS[c], kinds[i]
        made = make(kind, shape, dtype, context.seed % 1000 + 10 * i + j)
        right = witness.completed(*made, budget.coverage, budget.minimum, completion)
        q, k, v = (x.to(context.device) for x in made)
        # Triton selects and no more, by a program for every dtype and shape: once each.
        for backend in ("reference",) if small or i >= len(SHAPES) else ("reference", "triton"):
            got = qaxis.topk_attention(q, k, v, budget, backend=backend, completion=completion)
            name, by = _named(kind, shape, dtype, completion), "witness"
            tally.bits(name, by if backend == "reference" else backend, got, (right["output"], right["indices"]))
        plain = qaxis.topk_attention(q, k, v, budget, backend="reference")
        if c == 0:
            off = qaxis.topk_attention(q, k, v, budget, backend="reference", completion="none")
            tally.stays(_named(kind, shape, dtype, "none"), off, plain)
        tally.stays(f"{_named(kind, shape, dtype, completion)}, indices", (got.indices,), (plain.indices,))


def _beside(context: Context, tally: Tally) -> None:
    """Padding, windows, tokens before the first key, soft caps and sinks: ``attend`` against NumPy."""
    budget = qaxis.Budget(0.1, 5)
    for i, (beside, completion) in enumerate(itertools.product(BESIDE, COMPLETIONS)):
        shape = (2, 4, 2, 3, 517, 32)
        _, h, _, m, n, d = shape
        made = make("sink" if beside.sink else "normal", shape, DTYPES[i % 3], 4000 + i)
        q, k, v = (x.to(context.device) for x in made)
        end = torch.arange(n - m + 1, n + 1)
        begin = torch.tensor(beside.pads)[:, None].maximum(end - (beside.window or n)).minimum(end)
        place = torch.arange(n)
        allowed = ((place >= begin[..., None]) & (place < end[:, None]))[:, None].to(context.device)
        # From below every key to above most queries' best.
        sink = torch.linspace(-1, 8, h) if beside.sink else None
        logits = Logits(d**-0.5, beside.cap, None if sink is None else sink.to(context.device))
        indices = door.select(q, k, allowed, budget.of(allowed), backend="reference")
        seen = seen_of(allowed, beside.offset)
        out = door.attend(q, k, v, indices, logits, backend="reference", completion=completion, seen=seen)
        told = witness.Setting(
            begin.numpy(), beside.offset, None, beside.cap, None if sink is None else sink.numpy()
        )  # fmt: skip
        right = witness.completed(*made, budget.coverage, budget.minimum, completion, told)
        tally.bits(f"{beside.name}, {completion}", "witness", (out, indices), (right["output"], right["indices"]))
        weights = _by_weights(q, k, v, indices, allowed, seen, logits, completion)
        tally.close(f"{beside.name}, {completion}", "weights", weights, out, v)


def _by_weights(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, allowed: torch.Tensor, seen: Seen,
    logits: Logits, completion: str,
) -> torch.Tensor:  # fmt: skip
    """The masked way: one product of weights, which are not canonical, and values."""
    group, score = q.shape[1] // k.shape[1], canonical.scores(q, k)
    chosen = indices_to_mask(indices, k.shape[2])
    weights = completed_weights(score, chosen, allowed.expand_as(chosen), seen, logits, completion)
    return (weights @ v.float().repeat_interleave(group, 1)).to(q.dtype)


def _quantised(context: Context, tally: Tally) -> None:
    """Keys and values of an 8-bit cache: the bits of the dequantised ones."""
    for i, (dtype, completion) in enumerate(itertools.product((torch.float32, torch.bfloat16), COMPLETIONS)):
        q, k, v = (x.to(context.device) for x in make("outlier channel", (1, 4, 2, 1, 400, 64), dtype, 5000 + i))
        held, values = stored(k, 4), stored(v, 4)
        got = qaxis.topk_attention(q, held, values, BUDGETS[0], completion=completion)  # type: ignore[arg-type]
        made = (q.cpu(), held.dequantized().cpu(), values.dequantized().cpu())
        right = witness.completed(*made, BUDGETS[0].coverage, BUDGETS[0].minimum, completion)
        name = f"8-bit cache, {str(dtype)[6:]}, {completion}"
        tally.bits(name, "witness", got, (right["output"], right["indices"]))


def _steps(context: Context) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, int]]:
    """(kind, shape, dtype, keys kept) of decode steps; each dtype and size is a kernel of its own to compile."""
    if context.device == "cpu":
        every = ("normal", "outlier key", *([] if context.quick else ("equal keys", "zero query", *APART[1:5])))
        for kind in every:
            yield kind, (1, 3, 1, 1, 900, 64), torch.bfloat16, 100
        if not context.quick:
            yield "normal", (2, 4, 2, 1, 700, 128), torch.float32, 33
            yield "one dominates", (1, 2, 2, 1, 1300, 64), torch.float16, 16
        return
    kinds = ("normal", "outlier key") if context.quick else tuple(KINDS)
    for i, kind in enumerate(kinds):
        shape, k_eff, _ = STEPPED[i % len(STEPPED)]
        yield kind, shape, torch.bfloat16, k_eff
    for shape, k_eff, dtype in STEPPED:
        if dtype is not None and not context.quick:
            yield from ((kind, shape, dtype, k_eff) for kind in OF_THE_TYPE)


def _bits(out: Prefill) -> torch.Tensor:
    return cast(torch.Tensor, out.bits)


def _stepped(context: Context, tally: Tally) -> None:
    """The decode step of CUDA C++, emulated on a CPU: over bounds it has the bits of ``topk_attention``.

    Over 8-bit codes those of its own reference, which is handed the places that the step found.
    """
    if context.device == "cpu" and not emulator.available():
        return
    generator = torch.Generator(context.device).manual_seed(context.seed)
    made: dict[tuple[int, ...], Decoder] = {}
    plan = list(_steps(context))
    for kind, shape, dtype, k_eff in context.progress(plan, "completed steps"):
        q, k, v = make(kind, shape, dtype, generator)
        if not torch.isfinite(canonical.scores(q, k)).all():
            continue
        b, h, _, _, n, d = shape
        step = made.setdefault((b, h, n, d, k_eff), Decoder(b, h, n, d, k_eff, context.device))
        for way, keys, values, index in ways(k, v):
            # Triton's step puts nothing back.
            if step.cuda_step(q, keys, values, index, completion=COMPLETIONS[0]) is None:
                continue
            dense = (keys.dequantized(), values.dequantized()) if isinstance(keys, Stored) else (k, v)
            # What has no completion is another program to compile: of one shape.
            if shape == plan[0][1]:
                plain = step(q, keys, values, index)
                kept = (plain.output.clone(), plain.indices.clone())
                off = step(q, keys, values, index, completion="none")
                tally.stays(f"step, {way}, {_named(kind, shape, dtype, 'none')}", (off.output, off.indices), kept)
            _step(tally, step, (q, keys, values, index), dense, partial(_named, kind, shape, dtype), way)


def _step(
    tally: Tally, step: Decoder, arguments: tuple[torch.Tensor, Any, Any, KeyIndex],
    dense: tuple[torch.Tensor, torch.Tensor], named: Callable[[str], str], way: str,
) -> None:  # fmt: skip
    """One step of each completion over ``arguments``, whose keys and values are ``dense``."""
    (q, *_, index), k_eff, moments = arguments, step.made_for.k_eff, summed(*dense)
    if index.codes is not None:
        # Which keys are kept does not depend on what becomes of the others.
        indices = qaxis.topk_indices(q, dense[0], k_eff, backend="reference")
    for completion in COMPLETIONS:
        got = step(*arguments, completion=completion, moments=moments)
        if index.codes is None:
            output, indices = qaxis.topk_attention(q, *dense, k_eff, backend="reference", completion=completion)
        else:
            work = cast(CudaStep, step.cuda_step(*arguments, completion=completion)).buffers
            output = places.attend(
                q, *dense, indices, step.all_rows, work.fast, work.units, Logits(q.shape[3] ** -0.5), completion,
                index.codes.first.shape[2],
            )  # fmt: skip
        tally.bits(named(completion), f"step_{way}", (got.output, got.indices), (output, indices))


def _prompted(context: Context, tally: Tally) -> None:
    """Prompts on matrix products and the masked way: the canonical sets, outputs near the canonical ones."""
    generator = torch.Generator(context.device).manual_seed(context.seed)
    small = context.device == "cpu"
    shape = (1, 2, 1, 6, 300, 32) if small else (1, 8, 2, 256, 3072, 128)
    tuning, budget = INTERPRETED if small else PrefillTuning(), qaxis.Budget(0.1, 16)
    plan = list(itertools.product(APART[:2] if context.quick else APART, COMPLETIONS))
    for i, (kind, completion) in enumerate(context.progress(plan, "completed prompts")):
        dtype = DTYPES[i % 3]
        _, k, v = make(kind, shape, dtype, generator)
        q = torch.randn(*shape[:2], shape[3], shape[5], generator=generator, device=context.device).to(dtype)
        right = qaxis.topk_attention(q, k, v, budget, backend="reference", completion=completion)
        name = _named(kind, shape, dtype, completion)
        got = prefill_attention(q, k, v, budget, selection=True, tuning=tuning, completion=completion)
        tally.close(name, "prompt", got.output, right.output, v)
        tally.stays(f"prompt, {name}, indices", (selected_positions(_bits(got)),), (right.indices,))
        # What has no completion is another program to compile: of one dtype.
        if dtype == torch.bfloat16:
            plain = prefill_attention(q, k, v, budget, selection=True, tuning=tuning)
            off = prefill_attention(q, k, v, budget, selection=True, tuning=tuning, completion="none")
            tally.stays(f"prompt, {name}", (_bits(off), off.output), (_bits(plain), plain.output))
        allowed = causal_mask(shape[3], shape[4], q.device)
        logits = Logits(shape[5] ** -0.5)
        weights = _by_weights(q, k, v, right.indices, allowed, seen_of(allowed), logits, completion)
        tally.close(name, "weights", weights, right.output, v)

"""What top-k leaves out, in theory: the exact error of a completion, bounds on it, and where it hurts (section 5).

Everything here is float64 or exact, but for the library's outputs, which are held to it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import torch

import qaxis
from qaxis.attention.selection import indices_to_mask
from qaxis.storage.moments import GROUP

from ..harness.claim import Context, Result, value
from ..inputs.capture import Captured, capture, first_middle_last
from .certified import stored

KINDS = ("mean", "linear")
BUDGETS = {"c10": qaxis.Budget(0.1, 64), "c05": qaxis.Budget(0.05, 32)}
#: measured tokens of a text, so far apart that each sees another number of keys beside whole groups
FIRST, STEP = 200, 113
#: float64 sums, of the largest value
EXACT = 1e-9
#: what rounding to float32 may move an output, of the largest value
ROUNDED = 2.0**-18


# ---- One query of every head -----------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A token's queries, one a head, and what it sees, float64.

    Attributes:
        x: scores ``[H, N]``. v: values ``[H, N, Dv]``.
        chosen: the selected keys, bool ``[H, N]``.
        whole: so many first keys are those of whole groups; the line is fitted to the unselected ones of them.
        scale: of the softmax.
    """

    x: torch.Tensor
    v: torch.Tensor
    chosen: torch.Tensor
    whole: int
    scale: float

    @property
    def fitted(self) -> torch.Tensor:
        """The keys that the line is fitted to, bool ``[H, N]``."""
        return ~self.chosen & (torch.arange(self.x.shape[1], device=self.x.device) < self.whole)

    @property
    def p(self) -> torch.Tensor:
        """Weights relative to the best key's."""
        return torch.exp((self.x - self.x.amax(-1, keepdim=True)) * self.scale)


class Line(NamedTuple):
    """Values as a function of the score, ``mean + slope (x - middle)``; spread: squared distances of scores, summed."""

    middle: torch.Tensor
    mean: torch.Tensor
    slope: torch.Tensor
    spread: torch.Tensor
    #: whether it is a line; of a mean the slope is 0
    sloped: bool

    def at(self, x: torch.Tensor) -> torch.Tensor:
        """Values ``[H, N, Dv]`` at scores ``[H, N]``."""
        return self.mean[:, None] + (x - self.middle[:, None])[..., None] * self.slope[:, None]


def fitted(rows: Rows, kind: str) -> Line:
    """Least squares over the unselected keys of whole groups."""
    among = rows.fitted.double()
    count = among.sum(-1, keepdim=True)
    middle, mean = (among * rows.x).sum(-1) / count[:, 0], (among[:, None] @ rows.v)[:, 0] / count
    away = among * (rows.x - middle[:, None])
    spread = away.square().sum(-1)
    slope = (away[:, None] @ rows.v)[:, 0] / spread[:, None]
    sloped = kind == "linear"
    return Line(middle, mean, slope if sloped else torch.zeros_like(slope), spread, sloped)


def output(rows: Rows, line: Line | None) -> torch.Tensor:
    """What attention gives, ``[H, Dv]``: dense where ``line`` is None, else completed by it."""
    p = rows.p
    put = rows.v if line is None else torch.where(rows.chosen[..., None], rows.v, line.at(rows.x))
    return (p[:, None] @ put)[:, 0] / p.sum(-1, keepdim=True)


def selected_only(rows: Rows) -> torch.Tensor:
    """What attention over the selected keys gives."""
    p = torch.where(rows.chosen, rows.p, 0.0)
    return (p[:, None] @ rows.v)[:, 0] / p.sum(-1, keepdim=True)


def predicted(rows: Rows, line: Line) -> torch.Tensor:
    """The error by Theorem 4: mass left out times (weighted mean of its values - that of the line)."""
    tail = torch.where(rows.chosen, 0.0, rows.p)
    mass, share = tail.sum(-1, keepdim=True), tail / tail.sum(-1, keepdim=True)
    values, drawn = (share[:, None] @ rows.v)[:, 0], (share[:, None] @ line.at(rows.x))[:, 0]
    return mass / rows.p.sum(-1, keepdim=True) * (values - drawn)


class Known(NamedTuple):
    """What a selector knows of residuals that read the values of selected keys, and of keys of no whole group.

    Attributes:
        apart: lengths ``[H, N]`` of the residuals of keys of no whole group, 0 elsewhere.
        together: length ``[H]`` of all residuals of unselected keys of whole groups, if beside the moments the sum of
            the squares of values is kept.
        most: their largest length ``[H]`` along one direction, if the second moment of values is.
    """

    apart: torch.Tensor
    together: torch.Tensor
    most: torch.Tensor


def known(rows: Rows, line: Line) -> Known:
    """No value of an unselected key of a whole group is looked at, but in sums over all keys of whole groups."""
    n, v = rows.whole, rows.v[:, : rows.whole]
    moment, own = v.transpose(1, 2) @ v, torch.where(rows.chosen[:, :n, None], v, 0.0)
    apart = (rows.v[:, n:] - line.at(rows.x[:, n:])).norm(dim=-1)
    left = moment - own.transpose(1, 2) @ own
    left = left - rows.fitted.sum(-1)[:, None, None] * line.mean[:, :, None] * line.mean[:, None]
    left = left - line.spread[:, None, None] * line.slope[:, :, None] * line.slope[:, None]
    # Differences of large sums: what float64 may have lost is added.
    slack = EXACT * moment.diagonal(dim1=1, dim2=2).sum(-1)
    together = (left.diagonal(dim1=1, dim2=2).sum(-1).clamp(min=0) + slack).sqrt()
    most = (torch.linalg.eigvalsh(left)[:, -1].clamp(min=0) + slack).sqrt()
    return Known(torch.nn.functional.pad(apart, (n, 0)), together, most)


def straight(rows: Rows, x: torch.Tensor, p: torch.Tensor, line: Line) -> tuple[torch.Tensor, torch.Tensor]:
    """The line in ``x`` through the weights ``p`` of the keys that are fitted to, at all keys ``[H, N]``; its slope.

    Of the mean a constant: its residuals are not orthogonal to scores.
    """
    among = rows.fitted.double()
    count = among.sum(-1, keepdim=True)
    middle, mean = ((among * y).sum(-1, keepdim=True) / count for y in (x, p))
    away = among * (x - middle)
    rise = line.sloped * (away * p).sum(-1, keepdim=True) / away.square().sum(-1, keepdim=True)
    return mean + rise * (x - middle), rise


def bounds(rows: Rows, line: Line, seen: Known) -> tuple[torch.Tensor, torch.Tensor]:
    """Theorem 5, ``[H]`` each: with the squares of all residuals together, and with their second moment."""
    p, total = rows.p, rows.p.sum(-1)
    ruled, _ = straight(rows, rows.x, p, line)
    crooked = (rows.fitted * (p - ruled)).norm(dim=-1)
    apart = (torch.where(rows.chosen, 0.0, p) * seen.apart).sum(-1)
    return (crooked * seen.together + apart) / total, (crooked * seen.most + apart) / total


class Blurred(NamedTuple):
    """The scores of unselected keys known only within ``width`` of ``x``, ``[H, N]`` each; of selected ones exactly."""

    x: torch.Tensor
    width: torch.Tensor


def blurred_output(rows: Rows, line: Line, blurred: Blurred) -> torch.Tensor:
    """Completed attention whose tail is summed over the centres of the intervals."""
    p = torch.exp((blurred.x - rows.x.amax(-1, keepdim=True)) * rows.scale)
    put = torch.where(rows.chosen[..., None], rows.v, line.at(blurred.x))
    return (p[:, None] @ put)[:, 0] / p.sum(-1, keepdim=True)


def blurred_bound(rows: Rows, line: Line, seen: Known, blurred: Blurred) -> torch.Tensor:
    """Theorem 6: nothing but centres, widths, the line's moments, and what :class:`Known` has."""
    among, tail = rows.fitted, ~rows.chosen
    p = torch.exp((blurred.x - rows.x.amax(-1, keepdim=True)) * rows.scale)
    width = torch.where(tail, blurred.width, 0.0)
    more = torch.expm1(rows.scale * width)
    ruled, rise = straight(rows, blurred.x, p, line)
    crooked = (among * (p - ruled)).norm(dim=-1)
    moved = rise[:, 0].abs() * (among * width).norm(dim=-1) + (among * more * p).norm(dim=-1)
    apart = (torch.where(tail, p * (1 + more), 0.0) * seen.apart).sum(-1)
    slope = line.slope.norm(dim=-1) * (p * (1 + more) * width).sum(-1)
    here = blurred_output(rows, line, blurred)
    away = (line.at(blurred.x) - here[:, None]).norm(dim=-1)
    least = torch.where(tail, p / (1 + more), p).sum(-1)
    return ((crooked + moved) * seen.together + apart + slope + (more * p * away * tail).sum(-1)) / least


# ---- Measured tokens -------------------------------------------------------------------------


@dataclass
class Found:
    """Of all measured tokens, one entry a head and token: ``numbers[what]``, and what is wrong in words."""

    numbers: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    violations: int = 0
    wrong: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, what: str, x: torch.Tensor) -> None:
        self.numbers.setdefault(what, []).append(x.flatten())

    def of(self, what: str) -> torch.Tensor:
        return torch.cat(self.numbers[what])

    def held(self, name: str, error: torch.Tensor, bound: torch.Tensor) -> None:
        """Errors that a bound is to hold."""
        over = int((error > bound * (1 + EXACT)).sum())
        self.violations += over
        if over:
            self.wrong.append(f"{name}: {over} of {error.numel()} errors above the bound")


def _rows_of(one: Captured, near: torch.Tensor, position: int, budget: qaxis.Budget) -> tuple[Rows, Blurred]:
    """The queries of a token, and what 8-bit codes of the whole groups tell of its scores."""
    group, n = one.q.shape[1] // one.k.shape[1], position + 1
    q, k = one.q[:, :, position : position + 1], one.k[:, :, :n]
    chosen = indices_to_mask(qaxis.topk_indices(q, k, budget, backend="reference"), n)[0, :, 0]
    wide, keys, coded, values = (
        q[0, :, 0].double(), *(y[0, :, :n].double().repeat_interleave(group, 0) for y in (one.k, near, one.v))
    )  # fmt: skip
    x = (keys @ wide[..., None])[..., 0]
    rows = Rows(x, values, chosen, n // GROUP * GROUP, q.shape[-1] ** -0.5)
    centre = torch.where(rows.fitted, (coded @ wide[..., None])[..., 0], x)
    width = torch.where(rows.fitted, wide.norm(dim=-1)[:, None] * (coded - keys).norm(dim=-1) * (1 + EXACT), 0.0)
    return rows, Blurred(centre, width)


def _measured(found: Found, name: str, label: str, rows: Rows, blurred: Blurred) -> None:
    """One token: errors of every kind, and bounds."""
    dense, mass = output(rows, None), torch.where(rows.chosen, 0.0, rows.p).sum(-1) / rows.p.sum(-1)
    found.add(f"{name}_none", (dense - selected_only(rows)).norm(dim=-1))
    found.add(f"{name}_mass", mass)
    errors = {}
    for kind in KINDS:
        line = fitted(rows, kind)
        seen = known(rows, line)
        errors[kind] = dense - output(rows, line)
        error, (together, second) = errors[kind].norm(dim=-1), bounds(rows, line, seen)
        found.add(f"{name}_{kind}", error)
        found.add(f"{name}_{kind}_bound", together)
        found.add(f"{name}_{kind}_second", second)
        for by, bound in (("bound", together), ("second moment", second)):
            found.held(f"{label}, {kind}, {by}", error, bound)
    deviation = (rows.fitted[..., None] * (rows.v - line.mean[:, None])).square().sum((1, 2))
    found.add(f"{name}_spread", (deviation / rows.fitted.sum(-1)).sqrt())
    found.add("explained", line.spread * line.slope.square().sum(-1) / deviation)
    # What a line takes off a mean's error: E / Z times the slope.
    excess = (torch.where(rows.chosen, 0.0, rows.p) * (rows.x - line.middle[:, None])).sum(-1) / rows.p.sum(-1)
    taken = excess[:, None] * line.slope
    apart = (errors["mean"] - errors["linear"] - taken).norm(dim=-1).max() / rows.v.abs().max()
    if not float(apart) <= EXACT:
        found.wrong.append(f"{label}: mean and line differ by something else than the slope, {float(apart):.1e}")
    here = blurred_output(rows, line, blurred)
    wide = blurred_bound(rows, line, seen, blurred)
    found.held(f"{label}, codes", (dense - here).norm(dim=-1), wide)
    found.add(f"{name}_coded", (dense - here).norm(dim=-1))
    found.add(f"{name}_moved", (output(rows, line) - here).norm(dim=-1))
    found.add(f"{name}_coded_bound", wide)
    found.add("width", (blurred.width.amax(-1) * rows.scale))


def _held_to_theory(found: Found, label: str, one: Captured, position: int, budget: qaxis.Budget, rows: Rows) -> None:
    """The library's outputs of a token have the error that Theorem 4 names, up to float32."""
    n = position + 1
    q, k, v = one.q[:, :, position:n], one.k[:, :, :n], one.v[:, :, :n]
    largest = float(rows.v.abs().max())
    for kind in KINDS:
        got = qaxis.topk_attention(q, k, v, budget, backend="reference", completion=kind).output[0, :, 0].double()
        line = fitted(rows, kind)
        gap = float((output(rows, None) - got - predicted(rows, line)).abs().max()) / largest
        found.add("rounding", torch.tensor([gap]))
        found.names.append(f"{label}, {kind}, the library's error")
        if not gap <= ROUNDED:
            found.wrong.append(f"{label}, {kind}: the library's error is off by {gap:.1e} of the largest value")


# ---- The smallest examples -------------------------------------------------------------------


def exact_errors(powers: Sequence[int], values: Sequence[int]) -> dict[str, Fraction]:
    """Errors of one channel in rational numbers: weights are 2^x, the first key is kept, the others are fitted to."""
    zero = Fraction(0)
    x, v, p = [Fraction(a) for a in powers], [Fraction(a) for a in values], [Fraction(1 << a) for a in powers]
    total, n = sum(p, zero), len(powers) - 1
    dense = sum((a * b for a, b in zip(p, v, strict=True)), zero) / total
    middle, mean = sum(x[1:], zero) / n, sum(v[1:], zero) / n
    spread = sum(((a - middle) ** 2 for a in x[1:]), zero)
    together = sum(((a - middle) * b for a, b in zip(x[1:], v[1:], strict=True)), zero)
    found = {"none": v[0] - dense}
    for kind, slope in (("mean", zero), ("linear", together / spread if spread else zero)):
        tail = sum((a * (mean + slope * (b - middle)) for a, b in zip(p[1:], x[1:], strict=True)), zero)
        found[kind] = (p[0] * v[0] + tail) / total - dense
    return found


#: scores in powers of two, and values: nothing is lost without a completion; with a mean, with a line
EXAMPLES = {"mean": ((2, 1, 0), (0, 1, -2)), "linear": ((3, 2, 1, 0), (0, 0, 1, -2))}


def _examples(found: Found) -> dict[str, Any]:
    """With fewer keys than in :data:`EXAMPLES` a completion never loses; with those it does, in the library too."""
    tried = worse = 0
    small = [((x, 0), v) for x in range(6) for v in itertools.product(range(-5, 6), repeat=2)]
    more = itertools.product(itertools.combinations_with_replacement((4, 3, 2, 1, 0), 3), range(-2, 3), range(-2, 3))
    for kinds, powers, values in [
        *((KINDS, *one) for one in small), *((KINDS[1:], x, (0, a, b)) for x, a, b in more)
    ]:  # fmt: skip
        errors = exact_errors(powers, values)
        tried += 1
        worse += any(abs(errors[kind]) > abs(errors["none"]) for kind in kinds)
    if worse:
        found.wrong.append(f"{worse} of {tried} smaller examples lose by a completion")
    exact: dict[str, dict[str, str]] = {}
    for name, (powers, values) in EXAMPLES.items():
        errors = exact_errors(powers, values)
        exact[name] = {kind: str(error) for kind, error in errors.items()}
        if errors["none"] or not errors[name]:
            found.wrong.append(f"the example of {len(powers)} keys gives {exact[name]}")
        # A whole group of each.
        k, v = (torch.tensor(y, dtype=torch.float32).repeat_interleave(GROUP) for y in (powers, values))
        for kind, error in errors.items():
            got = qaxis.topk_attention(
                torch.ones(1, 1, 1, 1), k.reshape(1, 1, -1, 1), v.reshape(1, 1, -1, 1), GROUP, scale=math.log(2),
                backend="reference", completion=kind,
            ).output  # fmt: skip
            # Dense attention gives 0.
            if abs(float(got) - float(error)) > 1e-6:
                found.wrong.append(f"{len(powers)} keys, {kind}: the library gives {float(got)}, exact is {error}")
            found.names.append(f"{len(powers)} keys, {kind}")
    found.names.append("fewer keys")
    return {"tried": tried, "worse": worse, "exact": exact}


# ---- The check -------------------------------------------------------------------------------


@torch.inference_mode()
def bound(context: Context) -> Result:
    """Identities and bounds on the heads of a model, and the smallest examples."""
    found = Found()
    examples = _examples(found)
    model, ids = context.subjects.model, context.subjects.texts[0]
    layers = first_middle_last(model)
    captured = capture(model, ids, layers if context.quick else None)
    positions = list(range(FIRST, ids.shape[1], STEP))
    for one in context.progress(captured, "layers"):
        near = stored(one.k, 4).dequantized()
        for (i, position), (name, budget) in itertools.product(enumerate(positions), BUDGETS.items()):
            rows, blurred = _rows_of(one, near, position, budget)
            label = f"layer {one.layer}, position {position}, {name}"
            found.names.append(label)
            _measured(found, name, label, rows, blurred)
            if one.layer in layers and i % 4 == 0:
                _held_to_theory(found, label, one, position, budget, rows)
    return _result(found, examples, len(captured), len(positions))


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def _result(found: Found, examples: dict[str, Any], layers: int, positions: int) -> Result:
    """Medians and shares of what was found."""
    tokens = found.of("c10_none").numel()
    values: dict[str, dict[str, Any]] = {
        "tokens": value(len(BUDGETS) * tokens, "heads x tokens x budgets"), "layers": value(layers, "layers"),
        "violations": value(found.violations, "bounds", n=5 * len(BUDGETS) * tokens),
        "rounding": value(float(found.of("rounding").max()), "of the largest value"),
        "explained": value(100 * float(found.of("explained").median()), "% of the squares"),
        "width": value(float(found.of("width").median()), "logits"),
        "smaller": value(examples["worse"], "examples", n=examples["tried"]),
    }  # fmt: skip
    rows = []
    for name in BUDGETS:
        none, mass = found.of(f"{name}_none"), found.of(f"{name}_mass")
        row: dict[str, Any] = {"budget": name, "mass": 100 * float(mass.mean())}
        for kind in KINDS:
            error = found.of(f"{name}_{kind}")
            row[kind] = _rms(error) / _rms(none)
            row[f"{kind}_hurts"] = 100 * float((error > none).double().mean())
            for by in ("bound", "second"):
                ratio = found.of(f"{name}_{kind}_{by}") / error
                row[f"{kind}_{by}"], row[f"{kind}_{by}_least"] = float(ratio.median()), float(ratio.min())
        line, coded = found.of(f"{name}_linear"), found.of(f"{name}_coded")
        row["of_mass"] = float((found.of(f"{name}_linear_bound") / (mass * found.of(f"{name}_spread"))).median())
        row["coded"], row["moved"] = _rms(coded) / _rms(line), _rms(found.of(f"{name}_moved")) / _rms(line)
        row["coded_bound"] = float((found.of(f"{name}_coded_bound") / found.of(f"{name}_linear_bound")).median())
        rows.append(row)
        values |= {f"{name}_{what}": value(x, "") for what, x in row.items() if what != "budget"}
    wrong = found.wrong
    return Result(
        passed=not wrong,
        verdict=wrong[0] if wrong else "no error above its bound; the library's errors are those of the theorem",
        headline=f"{found.violations} of {values['violations']['n']} errors above their bound; of the error of a tenth "
        f"of the keys the mean leaves {rows[0]['mean']:.2f}, the line {rows[0]['linear']:.2f}",
        values=values,
        cases=len(found.names),
        data={"rows": rows, "examples": examples["exact"]},
        checks=found.names,
    )

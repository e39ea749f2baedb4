"""Theorem 3: which pairs of keys keep their order in floating point, and what rounding costs a model."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings, target
from hypothesis import strategies as st

import qaxis
from qaxis.arithmetic import reference as canonical
from qaxis.arithmetic.rounding import order_error_bound

from ..harness.claim import Context, NotRunError, Result, value
from ..inputs.seeded import DTYPES, bell, integers
from ..rivals.selectors import other_scores, selecting
from .changes import as_value, in_words

DIMS = (2, 16, 64, 128, 256)
#: what the terms of a score do: mixed signs, all positive, sum far below its terms, many magnitudes
DATA = ("mixed", "positive", "cancelling", "wide")
#: where generated gaps aim, in ulps of the absolute sum, and in multiples of the bound
ULPS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
AROUND = (0.9, 0.99, 1.01, 1.1)


class OrderLostError(Exception):
    """Two keys whose gap exceeds the bound, in the wrong order."""


def pairs(
    dim: int, dtype: torch.dtype, data: str, count: int, aim: float, unit: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, a, b, each ``[count, dim]``, where a and b have nearly the same exact score.

    Every component of b differs, otherwise rounding, being monotone, could tie a pair but never invert it.
    float32: in half of the pairs components move by a few ulps, in the others b is unrelated to a, so that
    errors of the query do not cancel; then one component makes the gap about ``aim`` units. The short types have
    no such small steps: components that the query weighs alike are exchanged, then one moves by one step.
    """
    q, a = bell((count, dim), seed), bell((count, dim), seed, 1)
    if data == "positive":
        q, a = q.abs(), a.abs()
    elif data == "wide":
        a = a * canonical.power_of_two(integers(-8, 8, (count, dim), seed).int())
    half = dim // 2
    if data == "cancelling":
        a[:, half : 2 * half], q[:, half : 2 * half] = -a[:, :half], q[:, :half]
    if dtype != torch.float32:
        q[:, half : 2 * half] = q[:, :half]
        q, a = q.to(dtype), a.to(dtype)
        exchanged = torch.cat([a[:, half : 2 * half], a[:, :half], a[:, 2 * half :]], -1)
        which = integers(0, 2, (count, half), seed, 1).bool()
        which = torch.cat([which, which, torch.zeros(count, dim - 2 * half, dtype=torch.bool)], -1)
        b = torch.where(which, exchanged, a)
        one = integers(0, dim, (count, 1), seed, 2).long()
        b.scatter_(-1, one, torch.nextafter(b.gather(-1, one), torch.tensor(-torch.inf, dtype=dtype)))
        return q, a, b
    absolute = (q.double() * a.double()).abs().sum(-1, keepdim=True)
    if unit == "ulp":
        size = 2.0 ** (torch.floor(torch.log2(absolute)) - 23)
    else:
        size = 2 * order_error_bound(q[:, None, None], a[:, None, None])[:, 0, 0]
    b = (a.double() * (1 + integers(-8, 9, (count, dim), seed, 1).double() * 2.0**-23)).float()
    b[::2] = a.roll(1, 0)[::2]
    # The rest of the gap goes to the component with the largest weight: it needs the smallest move.
    gap = (q.double() * (a.double() - b.double())).sum(-1, keepdim=True)
    largest = q.abs().argmax(-1, keepdim=True)
    step = (aim * size - gap) / q.gather(-1, largest).double()
    return q, a, b.scatter(-1, largest, (b.gather(-1, largest).double() - step).float())


def exact_gaps(q: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """<q, a> - <q, b>, correctly rounded: float64 holds the products exactly and fsum rounds once."""
    terms = torch.cat([q.double() * a.double(), -q.double() * b.double()], -1).tolist()
    return np.array([math.fsum(row) for row in terms])


def compare(q: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> dict[str, np.ndarray]:
    """Gap, bound and what the canonical scores of raw and unit query say, one entry a pair whose gap is not 0."""
    gap = exact_gaps(q, a, b)
    # Orient every pair so that the first key is the better one.
    swap = torch.from_numpy(gap < 0)[:, None]
    a, b = torch.where(swap, b, a), torch.where(swap, a, b)
    both = torch.stack([a, b], 1)
    bound = order_error_bound(q[:, None, None], both[:, None])[:, 0, 0].sum(-1)
    absolute = (q.double()[:, None] * both.double()).abs().sum(-1).amax(-1)
    raw = canonical.pair_scores(q.float()[:, None], both.float())
    unit = canonical.pair_scores(qaxis.unit_query(q)[:, None], both.float())
    keep = gap != 0
    found = {
        "gap": np.abs(gap), "bound": bound.numpy(), "ulp": 2.0 ** (np.floor(np.log2(absolute.numpy())) - 23),
        "raw_wrong": (raw[:, 0] <= raw[:, 1]).numpy(), "unit_wrong": (unit[:, 0] <= unit[:, 1]).numpy(),
        "raw_inverted": (raw[:, 0] < raw[:, 1]).numpy(), "unit_inverted": (unit[:, 0] < unit[:, 1]).numpy(),
    }  # fmt: skip
    return {name: x[keep] for name, x in found.items()}


def _searched(
    dim: int, dtype: torch.dtype, data: str, count: int, start: int
) -> tuple[dict[str, np.ndarray], list[str]]:
    """(what :func:`compare` finds of pairs of one kind, what is wrong with it in words)."""
    aims = [(x, "ulp") for x in ULPS] + [(x, "bound") for x in AROUND]
    drawn = [pairs(dim, dtype, data, count, x, unit, start + j) for j, (x, unit) in enumerate(aims)]
    q, a, b = (torch.cat(part) for part in zip(*drawn, strict=True))
    found, said = compare(q, a, b), []
    above, lost = found["gap"] > found["bound"], found["raw_wrong"] | found["unit_wrong"]
    if (wrong := int((above & lost).sum())) or not above.any():
        said.append(f"{wrong} pairs above the bound lost their order ({int(above.sum())} above)")
    # Scaling the query by a power of two: exact, so the bits are those of the score, scaled.
    for exponent in (-20, 20):
        factor = 2.0**exponent
        plain = canonical.pair_scores(q.float(), a.float())
        if not torch.equal(canonical.pair_scores(q.float() * factor, a.float()), plain * factor):
            said.append(f"2^{exponent} changed a bit")
    if dtype == torch.float32 and not lost.any():
        said.append("no order lost below the bound, the pairs are no near ties")
    return found, said


def order_bound(context: Context) -> Result:
    """Search for violations of Theorem 3; count inversions on either side of the bound."""
    count = 64 if context.quick else 512
    dims = DIMS[::2] if context.quick else DIMS
    plan = list(itertools.product(dims, DTYPES, DATA))
    total: dict[str, list[np.ndarray]] = {}
    by_dim: dict[int, list[dict[str, np.ndarray]]] = {d: [] for d in dims}
    failures, names = [], []
    for i, (dim, dtype, data) in enumerate(context.progress(plan, "near ties")):
        name = f"{str(dtype)[6:]}, dim {dim}, {data}"
        found, said = _searched(dim, dtype, data, count, context.seed + 100 * i)
        failures += [f"{name}: {what}" for what in said]
        names += [f"order, {name}", f"powers of two, {name}"]
        if dtype == torch.float32:
            by_dim[dim].append(found)
        for key, x in found.items():
            total.setdefault(key, []).append(x)
    every = {key: np.concatenate(x) for key, x in total.items()}
    below, lost = every["gap"] <= every["bound"], every["raw_wrong"] | every["unit_wrong"]
    inverted = {k: int((below & every[f"{k}_inverted"]).sum()) for k in ("raw", "unit")}
    searched, reached, failure = _attack(context)
    failures += [failure] if failure else []
    closest = max(float((every["gap"] / every["bound"])[lost].max()), reached)
    above = int((~below).sum())
    values = {
        "pairs": value(len(below), "pairs", n=len(below)), "above": value(above, "pairs", n=len(below)),
        "violations": value(int((~below & lost).sum()), "pairs", n=above),
        "raw_inverted": value(inverted["raw"], "pairs", n=int(below.sum())),
        "unit_inverted": value(inverted["unit"], "pairs", n=int(below.sum())),
        "closest": value(closest, "of the bound"), "searched": value(searched, "examples", n=searched),
    }  # fmt: skip
    headline = (
        f"{values['violations']['value']} of {above} pairs above the bound; below it {inverted['raw']} inverted raw, "
        f"{inverted['unit']} by unit query; worst at {closest:.2f} of the bound"
    )
    return Result(
        passed=not failures,
        verdict=failures[0] if failures else "order kept above the bound",
        headline=headline,
        values=values,
        cases=len(below),
        data={"curves": [_curve(dim, found) for dim, found in by_dim.items()]},
        checks=names,
    )


def _curve(dim: int, parts: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Inversion rate in half-octave bins of gap / ulp of the absolute sum."""
    joined = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
    ulps = joined["gap"] / joined["ulp"]
    edges = 2.0 ** np.arange(-4, 7.5, 0.5)
    rows = []
    for low, high in itertools.pairwise(edges):
        inside = (ulps >= low) & (ulps < high)
        if n := int(inside.sum()):
            raw, unit = (float(joined[f"{k}_wrong"][inside].mean()) for k in ("raw", "unit"))
            middle = round(float(np.sqrt(low * high)), 5)
            rows.append({"gap": middle, "pairs": n, "raw": round(raw, 6), "unit": round(unit, 6)})
    share = joined["bound"] / joined["ulp"]
    return {"dim": dim, "rows": rows, "bound_low": float(share.min()), "bound_high": float(share.max())}


def _attack(context: Context) -> tuple[int, float, str]:
    """Hypothesis climbs towards a violation: it is told the ratio gap/bound of every inverted pair."""
    best, examples = 0.0, 0

    @st.composite
    def case(draw: st.DrawFn) -> tuple[list[float], list[float], list[float]]:
        dim = draw(st.integers(1, 40))
        number = st.integers(-(2**24) + 1, 2**24 - 1)
        exponent = st.integers(-12, 12)
        q = [math.ldexp(draw(number), draw(exponent)) for _ in range(dim)]
        a = [math.ldexp(draw(number), draw(exponent)) for _ in range(dim)]
        b = list(a)
        for _ in range(draw(st.integers(1, 3))):
            d = draw(st.integers(0, dim - 1))
            b[d] = float(np.float32(a[d] * (1 + draw(st.integers(-16, 16)) * 2.0**-23)))
        return q, a, b

    def property_holds(drawn: tuple[list[float], list[float], list[float]]) -> None:
        nonlocal best, examples
        examples += 1
        q, a, b = drawn
        gap = sum(
            (Fraction(x) * (Fraction(y) - Fraction(z)) for x, y, z in zip(q, a, b, strict=True)), Fraction(0)
        )  # fmt: skip
        if gap == 0 or not any(q):
            return
        if gap < 0:
            a, b = b, a
        qt = torch.tensor(q, dtype=torch.float32)
        both = torch.tensor([a, b], dtype=torch.float32)
        bound = float(order_error_bound(qt[None, None, None], both[None, None])[0, 0, 0].sum())
        ratio = float(abs(gap)) / bound
        axes = torch.stack([qt, qaxis.unit_query(qt)])
        score = canonical.pair_scores(axes[:, None], both[None])
        if bool((score[:, 0] <= score[:, 1]).any()):
            best = max(best, ratio)
            if ratio > 1:
                raise OrderLostError(f"q={q}, a={a}, b={b}: order lost at {ratio:.3f} of the bound")
            target(ratio, label="gap / bound of a lost order")

    options = settings(
        max_examples=200 if context.quick else 2000, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.target, Phase.shrink],
    )  # fmt: skip
    try:
        seed(context.seed)(options(given(case())(property_holds)))()
    except OrderLostError as error:
        return examples, best, str(error)[:500]
    return examples, best, ""


# ---- On the model ---------------------------------------------------------------------------

#: other ranking scores: normalised first in float32; canonical but rounded to bfloat16, as the published heap key
OTHERS = ("unit", "bf16")
#: texts whose perplexity is measured with each
TEXTS = 10


def brute_top(scores: torch.Tensor, k_eff: int) -> torch.Tensor:
    """Top-k by a full stable sort of the ranking keys: slow, obvious, independent of the selection code."""
    best = torch.argsort(canonical.sort_key(scores), dim=-1, descending=True, stable=True)[..., :k_eff]
    return best.sort(dim=-1).values


@dataclass
class _Swaps:
    """Of some queries: how many have another set by each other score, by how many keys, and whether Theorem 3 holds."""

    queries: int = 0
    changed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OTHERS, 0))
    swapped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OTHERS, 0))
    inside: bool = True

    def count(self, q: torch.Tensor, k: torch.Tensor, k_eff: int) -> None:
        canon = qaxis.canonical_scores(q, k)
        truth = brute_top(canon, k_eff)
        self.queries += truth[..., 0].numel()
        mask = torch.zeros_like(canon, dtype=torch.bool).scatter_(-1, truth, True)
        bound = order_error_bound(q, k)
        for other in OTHERS:
            got = brute_top(other_scores(q, k, other), k_eff)
            chosen = torch.zeros_like(mask).scatter_(-1, got, True)
            self.changed[other] += int((chosen != mask).any(-1).sum())
            self.swapped[other] += int((chosen & ~mask).sum())
            if other == "unit":
                # Theorem 3 on real data: a key that left is within the two bounds of one that came.
                left, came = mask & ~chosen, chosen & ~mask
                low = torch.where(left, canon.double() - 2 * bound, -torch.inf).amax(-1)
                high = torch.where(came, canon.double() + 2 * bound, torch.inf).amin(-1)
                self.inside &= bool((low <= high).all())


def real_changes(context: Context) -> Result:
    """Queries of the model whose top-k set changes under another ranking score, by dtype."""
    budget = qaxis.Budget()
    values: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    checks, inside = [], True
    for dtype in DTYPES:
        swaps, short = _Swaps(), str(dtype)[6:]
        for layer, q, k, _ in context.progress(context.runs.captured, f"layers, {short}"):
            swaps.count(q[:, :, -256::4].to(dtype), k.to(dtype), budget.k_eff(k.shape[2]))
            checks += [f"{short}, layer {layer}, {o}" for o in OTHERS]
        inside &= swaps.inside
        n = swaps.queries
        for other in OTHERS:
            values[f"{short}_{other}"] = value(100 * swaps.changed[other] / n, "% of queries", n=n)
            values[f"{short}_{other}_keys"] = value(swaps.swapped[other] / n, "keys a query", n=n)
        rows.append({"dtype": short, "queries": n, **swaps.changed})
    headline = "; ".join(
        f"{r['dtype']}: unit {100 * r['unit'] / r['queries']:.2f} %, bf16 key {100 * r['bf16'] / r['queries']:.1f} %"
        for r in rows
    )
    return Result(
        # Rounding the score to eight bits must change something, or nothing was compared.
        passed=inside and all(r["bf16"] > 0 for r in rows),
        verdict="changes only inside the bound" if inside else "a set changed beyond the bound",
        headline=headline,
        values=values,
        cases=sum(r["queries"] for r in rows),
        data={"rows": rows},
        checks=checks,
    )


def perplexity_effect(context: Context) -> Result:
    """Perplexity with sets selected by the canonical, the unit and the bf16-rounded score, N = 8192, on a GPU."""
    if context.device == "cpu":
        raise NotRunError("this claim needs a GPU (--device cuda)")
    model = context.subjects.model
    texts = context.texts(2 if context.quick else TEXTS, 512 if context.quick else 8192)
    losses: dict[str, list[torch.Tensor]] = {"dense": [], "canonical": [], "unit": [], "bf16": []}
    for t, name in context.progress(list(itertools.product(range(len(texts)), losses)), "forward passes"):
        with selecting(model, name):
            losses[name].append(qaxis.token_losses(model, texts[t]))
    values: dict[str, Any] = {}
    sparse = qaxis.paired_change(losses["dense"], losses["canonical"], seed=context.seed)
    values["sparse"] = as_value(sparse)
    values["tokens"] = value(texts[0].shape[1], "tokens")
    changes = {o: qaxis.paired_change(losses["canonical"], losses[o], seed=context.seed) for o in OTHERS}
    values |= {other: as_value(change) for other, change in changes.items()}
    differs = any(float((a - b).abs().max()) > 0 for a, b in zip(losses["canonical"], losses["bf16"], strict=True))
    return Result(
        passed=differs and sparse.percent > 0,
        verdict="the selections differ" if differs else "the selections are the same",
        headline=", ".join(f"{other} {in_words(change, 4)}" for other, change in changes.items()),
        values=values,
        cases=len(texts) * len(losses),
        checks=[f"{name}, text {t}" for t in range(len(texts)) for name in losses],
    )

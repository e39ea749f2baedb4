"""Theorem 1 in exact arithmetic: the order, where it extends, and where it stops.

Numbers are rationals from beginning to end. u_Q = Q/|Q| is irrational in general, so coordinates along
it are compared by their signed squares, which are rational and increase with the coordinate. Hypothesis
draws and shrinks the cases; every property runs once per parameter and counts as one check each.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import mpmath
import torch
from hypothesis import HealthCheck, Phase, find, given, seed, settings
from hypothesis import strategies as st

import qaxis

from ..harness.claim import Context, Result, value

Vector = list[Fraction]

DIMS = (1, 2, 3, 5, 8, 16, 32, 64, 128, 256)
NUMBERS = ("integers", "rationals", "ties", "collinear")
EXTENSION_DIMS = (2, 6, 32)


class OrderDiffersError(Exception):
    """Two rankings that should be one; no ``assert``, which Python may leave out."""


def dot(a: Vector, b: Vector) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def unit_key(q: Vector, k: Vector) -> Fraction:
    """sign(x) x^2 of x = <u_Q, k>: rational, and increasing in x."""
    axis = dot(q, k)
    return (1 if axis >= 0 else -1) * axis * axis / dot(q, q)


def order(scores: Sequence[Any]) -> list[int]:
    """Positions from best to worst; a tie goes to the lower position."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def same_ranking(a: Sequence[Any], b: Sequence[Any], what: str) -> int:
    """The number of top-k sets compared, one for every k.

    Raises:
        OrderDiffersError: if the orders or two sets differ.
    """
    first, second = order(a), order(b)
    if first != second:
        raise OrderDiffersError(f"{what}: orders {first} and {second}")
    for k in range(1, len(a) + 1):
        if set(first[:k]) != set(second[:k]):
            raise OrderDiffersError(f"{what}: top-{k} sets differ")
    return len(a)


@st.composite
def queries_and_keys(draw: st.DrawFn, dim: int, numbers: str) -> tuple[Vector, list[Vector]]:
    """A non-zero query and keys with duplicates, the zero key, and keys along and against the query."""
    denominator = draw(st.integers(1, 97)) if numbers == "rationals" else 1

    def vector() -> Vector:
        # One byte a component: cheap to draw at 256 dimensions, and it shrinks to zeros.
        raw = draw(st.binary(min_size=dim, max_size=dim))
        if numbers == "ties":
            return [Fraction((b + 1) % 3 - 1) for b in raw]
        return [Fraction((b ^ 128) - 128 if b < 128 else 127 - b, denominator) for b in raw]

    q = vector()
    if not any(q):
        q[draw(st.integers(0, dim - 1))] = Fraction(1)
    keys = [vector() for _ in range(draw(st.integers(1, 8)))]
    if numbers == "collinear":
        keys = [[x * draw(st.integers(-3, 3)) for x in q] for _ in keys]
    keys += [list(k) for k in keys[: draw(st.integers(0, 2))]]
    if draw(st.booleans()):
        keys += [[Fraction(0)] * dim, list(q), [-x for x in q]]
    scale_q, scale_k = (Fraction(2) ** draw(st.integers(-100, 100)) for _ in range(2))
    return [x * scale_q for x in q], [[x * scale_k for x in k] for k in keys]


def _search(
    strategy: st.SearchStrategy[Any], holds: Callable[[Any], int], examples: int, start: int
) -> tuple[int, str]:
    """(top-k sets compared, shrunk failure or "") of one property."""
    sets = 0

    def property_holds(drawn: Any) -> None:
        nonlocal sets
        sets += holds(drawn)

    options = settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False,
    )  # fmt: skip
    try:
        seed(start)(options(given(strategy)(property_holds)))()
    except OrderDiffersError as error:
        return sets, str(error)[:500]
    return sets, ""


def _collect(
    context: Context,
    claim: str,
    plan: Sequence[tuple[str, st.SearchStrategy[Any], Callable[[Any], int]]],
    examples: int,
) -> Result:
    sets, failures = 0, []
    for i, (name, strategy, holds) in enumerate(context.progress(plan, claim)):
        compared, failure = _search(strategy, holds, examples, context.seed + i)
        sets += compared
        if failure:
            failures.append(f"{name}: {failure}")
        elif not compared:
            failures.append(f"{name}: compared nothing")
    values = {
        "properties": value(len(plan), "properties", n=len(plan)),
        "examples": value(len(plan) * examples, "queries", n=len(plan) * examples),
        "sets": value(sets, "top-k sets", n=sets),
    }
    headline = f"identical in {len(plan)} properties x {examples} cases, {sets} sets"
    return Result(
        passed=not failures,
        verdict=failures[0] if failures else "order and sets identical",
        headline=headline if not failures else f"{len(failures)} of {len(plan)} properties fail",
        values=values,
        cases=sets,
        checks=[name for name, _, _ in plan],
    )


def ranking(context: Context) -> Result:
    """Theorem 1 and its top-k corollary, for every dimension and kind of number."""

    def holds(drawn: tuple[Vector, list[Vector]]) -> int:
        q, keys = drawn
        return same_ranking([dot(q, k) for k in keys], [unit_key(q, k) for k in keys], f"q={q}, keys={keys}")

    dims = DIMS[::3] if context.quick else DIMS
    plan = [(f"dim {d}, {kind}", queries_and_keys(d, kind), holds) for d, kind in itertools.product(dims, NUMBERS)]
    return _collect(context, "exact properties", plan, 10 if context.quick else 25)


# ---- Where it extends -----------------------------------------------------------------------

positive = st.fractions(min_value=Fraction(1, 50), max_value=50, max_denominator=50)


def _monotone(scores: Sequence[Fraction], function: Callable[[Any], Any]) -> list[Any]:
    """``function`` of every score at 600 bits, after scaling the scores into [-16, 16].

    A positive factor is one of the extensions. Distinct scores of these sizes stay distinct at 600 bits.
    """
    largest = max((abs(s) for s in scores), default=Fraction(0)) or Fraction(1)
    with mpmath.workprec(600):
        return [function(mpmath.mpf((16 * s / largest).numerator) / (16 * s / largest).denominator) for s in scores]


def _rotate(x: Vector, position: int) -> Vector:
    """RoPE with rational rotations: pair j turns by position times an angle with tan(angle/2) = 1/(j+2)."""
    out = list(x)
    for j in range(len(x) // 2):
        t = Fraction(1, j + 2)
        cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        a, b = out[2 * j], out[2 * j + 1]
        for _ in range(position):
            a, b = a * cos - b * sin, a * sin + b * cos
        out[2 * j], out[2 * j + 1] = a, b
    return out


def _axis(q: Vector, keys: list[Vector]) -> list[Fraction]:
    return [unit_key(q, k) for k in keys]


def _scaling(q: Vector, keys: list[Vector], c: Fraction) -> int:
    return same_ranking([c * dot(q, k) for k in keys], _axis(q, keys), "positive scaling")


def _temperature(q: Vector, keys: list[Vector], c: Fraction) -> int:
    factor = 1 / c
    weights = _monotone([dot(q, k) for k in keys], lambda x: mpmath.exp(x * factor.numerator / factor.denominator))
    return same_ranking(weights, _axis(q, keys), "softmax at a temperature")


def _softmax(q: Vector, keys: list[Vector], c: Fraction) -> int:
    weights = _monotone([dot(q, k) for k in keys], mpmath.exp)
    with mpmath.workprec(600):
        weights = [w / mpmath.fsum(weights) for w in weights]
    return same_ranking(weights, _axis(q, keys), "softmax weights")


def _softcap(q: Vector, keys: list[Vector], c: Fraction) -> int:
    cap = mpmath.mpf(c.numerator) / c.denominator + 1
    return same_ranking(
        _monotone([dot(q, k) for k in keys], lambda x: cap * mpmath.tanh(x / cap)), _axis(q, keys), "soft cap"
    )


def _sink(q: Vector, keys: list[Vector], c: Fraction) -> int:
    weights = _monotone([dot(q, k) for k in keys], mpmath.exp)
    with mpmath.workprec(600):
        total = mpmath.fsum(weights) + mpmath.exp(mpmath.mpf(c.numerator) / c.denominator)
        weights = [w / total for w in weights]
    return same_ranking(weights, _axis(q, keys), "sink logit in the denominator")


def _causal(q: Vector, keys: list[Vector], c: Fraction) -> int:
    sets = 0
    for visible in range(1, len(keys) + 1):
        sets += same_ranking([dot(q, k) for k in keys[:visible]], _axis(q, keys[:visible]), "causal mask")
    return sets


def _padding(q: Vector, keys: list[Vector], c: Fraction) -> int:
    live = [k for i, k in enumerate(keys) if (c.numerator >> i % 6) & 1 or i == 0]
    return same_ranking([dot(q, k) for k in live], _axis(q, live), "padding mask")


def _grouped(q: Vector, keys: list[Vector], c: Fraction) -> int:
    heads = [q, [c * x for x in reversed(q)], [x + y for x, y in zip(q, keys[0], strict=True)]]
    return sum(same_ranking([dot(h, k) for k in keys], _axis(h, keys), "one head of a group") for h in heads if any(h))


def _rope(q: Vector, keys: list[Vector], c: Fraction) -> int:
    turned = [_rotate(k, i) for i, k in enumerate(keys)]
    query = _rotate(q, len(keys))
    if dot(query, query) != dot(q, q):
        raise OrderDiffersError("a rotation changed the length of the query")
    return same_ranking([dot(query, k) for k in turned], _axis(query, turned), "rotary positions")


EXTENSIONS: dict[str, Callable[[Vector, list[Vector], Fraction], int]] = {
    "positive scaling": _scaling, "softmax": _softmax, "temperature": _temperature, "soft cap": _softcap,
    "sink logit": _sink, "causal mask": _causal, "padding mask": _padding, "grouped heads": _grouped, "rope": _rope,
}  # fmt: skip


def extensions(context: Context) -> Result:
    """What models do to scores between the product and the weights, and keeps the order."""
    dims = EXTENSION_DIMS[:1] if context.quick else EXTENSION_DIMS
    plan = []
    for (name, rule), dim, kind in itertools.product(EXTENSIONS.items(), dims, ("integers", "ties")):
        strategy = st.tuples(queries_and_keys(dim, kind), positive)

        def holds(drawn: tuple[tuple[Vector, list[Vector]], Fraction], rule: Any = rule) -> int:
            return rule(*drawn[0], drawn[1])

        plan.append((f"{name}, dim {dim}, {kind}", strategy, holds))
    return _collect(context, "extensions", plan, 10 if context.quick else 20)


# ---- Where it stops -------------------------------------------------------------------------

small = st.integers(-4, 4)


def _stops() -> dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], bool], Callable[[Any], str]]]:
    """For each stop: what is drawn, whether the order breaks, and the case in words."""
    keys = st.tuples(small, small)
    slope, natural = st.integers(1, 4), st.integers(1, 4)

    def broken(q: int, k: tuple[int, int], other: list[int]) -> bool:
        # Reversed, not merely a tie that went the other way.
        return q * (k[0] - k[1]) * (other[0] - other[1]) < 0

    return {
        "ALiBi": (
            st.tuples(small, keys, slope),
            lambda x: broken(x[0], x[1], [x[0] * k - x[2] * (1 - i) for i, k in enumerate(x[1])]),
            lambda x: f"q = {x[0]}, keys {x[1]}, slope {x[2]}",
        ),
        "additive bias": (
            st.tuples(small, keys, st.tuples(small, small)),
            lambda x: broken(x[0], x[1], [x[0] * k + b for k, b in zip(x[1], x[2], strict=True)]),
            lambda x: f"q = {x[0]}, keys {x[1]}, biases {x[2]}",
        ),
        "scale per key": (
            st.tuples(small, keys, st.tuples(natural, natural)),
            lambda x: broken(x[0], x[1], [x[0] * k * c for k, c in zip(x[1], x[2], strict=True)]),
            lambda x: f"q = {x[0]}, keys {x[1]}, scales {x[2]}",
        ),
        "one selection per group": (
            st.tuples(small, small, keys),
            lambda x: broken(x[1], x[2], [x[0] * k for k in x[2]]),
            lambda x: f"queries {x[0]} and {x[1]}, keys {x[2]}",
        ),
        "negative scale": (
            st.tuples(small, keys),
            lambda x: broken(x[0], x[1], [-x[0] * k for k in x[1]]),
            lambda x: f"q = {x[0]}, keys {x[1]}, scale -1",
        ),
    }  # fmt: skip


def stops(context: Context) -> Result:
    """One shrunk counterexample for each stop; the library refuses what it can see."""
    found: dict[str, str] = {}
    for name, (strategy, breaks, say) in context.progress(list(_stops().items()), "counterexamples"):
        options = settings(max_examples=5000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        found[name] = say(find(strategy, breaks, settings=options, random=random.Random(context.seed)))
    refused = 0
    q = torch.ones(1, 1, 1, 4)
    for call in (
        lambda: qaxis.topk_attention(q, q, q, 1, scale=-1.0),
        lambda: qaxis.topk_attention(q, q, q, 1, scale=0.0),
        lambda: qaxis.unit_query(torch.zeros(4)),
    ):
        try:
            call()
        except ValueError:
            refused += 1
    values = {
        "stops": value(len(found), "counterexamples", n=len(found)),
        "refused": value(refused, "calls", n=3),
    }
    return Result(
        passed=len(found) == 5 and refused == 3,
        verdict=f"{len(found)} of 5 shrunk, {refused} of 3 calls refused",
        headline="; ".join(f"{name}: {text}" for name, text in found.items()),
        values=values,
        cases=len(found),
        data={"counterexamples": [{"stop": name, "case": text} for name, text in found.items()]},
        checks=list(found),
    )

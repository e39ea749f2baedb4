"""Theorem 1: over the rationals by Hypothesis, and in floating point on real queries and keys."""

from __future__ import annotations

from fractions import Fraction

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import qaxis
from qaxis import canonical

from ..claim import Context, Result, value

rationals = st.fractions(min_value=-8, max_value=8, max_denominator=64)


@st.composite
def queries_and_keys(draw: st.DrawFn) -> tuple[list[Fraction], list[list[Fraction]]]:
    """A non-zero query and keys with ties, duplicates, zero and opposite keys, at a drawn power-of-two scale."""
    dim = draw(st.integers(1, 12))
    vector = st.lists(rationals, min_size=dim, max_size=dim)
    q = draw(vector.filter(any))
    keys = draw(st.lists(vector, min_size=1, max_size=12))
    keys += [list(k) for k in keys[: draw(st.integers(0, 2))]]
    if draw(st.booleans()):
        keys += [[Fraction(0)] * dim, list(q), [-x for x in q]]
    scale = Fraction(2) ** draw(st.integers(-100, 100))
    return [x * scale for x in q], keys


def dot(a: list[Fraction], b: list[Fraction]) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def unit_key(q: list[Fraction], k: list[Fraction]) -> Fraction:
    """<u_Q, k> up to the increasing map x -> sign(x) x^2: u_Q is irrational, its signed square is not."""
    axis = dot(q, k)
    return (1 if axis >= 0 else -1) * axis * axis / dot(q, q)


def order(scores: list[Fraction]) -> list[int]:
    """Positions from best to worst; a tie goes to the lower position."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def theorem1(context: Context) -> Result:
    """Order and every top-k set agree, exactly."""
    counted = {"examples": 0, "sets": 0}

    def property_holds(drawn: tuple[list[Fraction], list[list[Fraction]]]) -> None:
        q, keys = drawn
        raw, unit = [dot(q, k) for k in keys], [unit_key(q, k) for k in keys]
        by_raw, by_unit = order(raw), order(unit)
        assert by_raw == by_unit, f"q={q}, keys={keys}: {by_raw} by <q,k>, {by_unit} by <u,k>"
        for k in range(1, len(keys) + 1):
            assert set(by_raw[:k]) == set(by_unit[:k]), f"q={q}, keys={keys}: top-{k} sets differ"
        counted["examples"] += 1
        counted["sets"] += len(keys)

    rounds = 2 if context.quick else 10
    failure = ""
    for i in context.progress(range(rounds), "rounds of 100 examples"):
        search = settings(
            max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )  # fmt: skip
        try:
            seed(context.seed + i)(search(given(queries_and_keys())(property_holds)))()
        except AssertionError as error:
            failure = str(error)[:500]
            break
    values = {
        "examples": value(counted["examples"], "queries", n=counted["examples"]),
        "sets": value(counted["sets"], "top-k sets", n=counted["sets"]),
    }
    if failure:
        return Result(False, failure, "order differs", values, counted["examples"])
    headline = f"identical in {counted['examples']} cases, {counted['sets']} sets"
    return Result(counted["examples"] >= 90 * rounds, "order and sets identical", headline, values, counted["sets"])


def real_ranking(context: Context) -> Result:
    """On the model's own tensors: the reference is the brute-force canonical set; normalising first is not always."""
    budget = qaxis.Budget()
    rows = changed = wrong = 0
    figure: dict[str, list[float]] = {}
    for layer, q, k, _ in context.progress(context.runs.captured, "layers"):
        queries = q[:, :, -64::4]
        n, group = k.shape[2], q.shape[1] // k.shape[1]
        k_eff = budget.k_eff(n)
        raw = qaxis.canonical_scores(queries, k)
        truth = _brute(raw, k_eff)
        got = qaxis.topk_indices(queries, k, budget, causal=False, backend="reference")
        unit = _brute(qaxis.canonical_scores(qaxis.unit_query(queries), k), k_eff)
        rows += truth[..., 0].numel()
        wrong += int((truth != got).any(-1).sum())
        changed += int((truth != unit).any(-1).sum())
        if not figure and layer > 0:
            figure = _schematic(queries[0, 0, -1], k[0, 0 // group], got[0, 0, -1], layer)
    values = {
        "queries": value(rows, "queries", n=rows),
        "reference_differs": value(wrong, "queries", n=rows),
        "normalised_differs": value(changed, "queries", n=rows),
    }
    headline = f"{wrong} of {rows} sets differ from brute force; normalising first in float32 changes {changed}"
    return Result(
        wrong == 0 and rows > 0, "certified set = canonical set", headline, values, rows, {"schematic": figure}
    )


def _brute(scores: torch.Tensor, k_eff: int) -> torch.Tensor:
    """Top-k by a full stable sort of the canonical keys: slow, obvious, independent of the selection code."""
    best = torch.argsort(canonical.sort_key(scores), dim=-1, descending=True, stable=True)[..., :k_eff]
    return best.sort(dim=-1).values


def _schematic(q: torch.Tensor, k: torch.Tensor, chosen: torch.Tensor, layer: int) -> dict[str, list[float]]:
    """Every key as (coordinate along the query axis, distance from it), for the figure."""
    u = q.double() / q.double().norm()
    along = k.double() @ u
    away = (k.double().square().sum(-1) - along.square()).clamp(min=0).sqrt()
    selected = torch.zeros(k.shape[0], dtype=torch.int64)
    selected[chosen.cpu()] = 1
    return {
        "along": [round(x, 4) for x in along.tolist()],
        "away": [round(x, 4) for x in away.tolist()],
        "selected": selected.tolist(),
        "layer": [layer],
    }

"""The certified selection against a full sort, on the model's own queries and keys."""

from __future__ import annotations

import torch

import qaxis

from ..harness.claim import Context, Result, value
from .floating import brute_top


def real_ranking(context: Context) -> Result:
    """The reference's set is the brute-force canonical set."""
    budget = qaxis.Budget()
    rows = wrong = 0
    figure: dict[str, list[float]] = {}
    checks = []
    for layer, q, k, _ in context.progress(context.runs.captured, "layers"):
        queries = q[:, :, -64::4]
        n, group = k.shape[2], q.shape[1] // k.shape[1]
        k_eff = budget.k_eff(n)
        raw = qaxis.canonical_scores(queries, k)
        truth = brute_top(raw, k_eff)
        got = qaxis.topk_indices(queries, k, budget, causal=False, backend="reference")
        rows += truth[..., 0].numel()
        wrong += int((truth != got).any(-1).sum())
        checks.append(f"layer {layer}")
        if not figure and layer > 0:
            figure = _schematic(queries[0, 0, -1], k[0, 0 // group], got[0, 0, -1], layer)
    values = {
        "queries": value(rows, "queries", n=rows),
        "reference_differs": value(wrong, "queries", n=rows),
    }
    return Result(
        passed=wrong == 0 and rows > 0,
        verdict="certified set = canonical set" if wrong == 0 else "a set differs from the canonical one",
        headline=f"{wrong} of {rows} sets differ from brute force",
        values=values,
        cases=rows,
        data={"schematic": figure},
        checks=checks,
    )


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

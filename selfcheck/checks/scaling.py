"""Theorem 2, descriptively: entropy against log N, and the perplexity cost of sparsity against N."""

from __future__ import annotations

import math

import numpy as np
import torch

import qaxis

from ..harness.claim import Context, Result, value
from ..inputs.passes import entropies, lengths_upto
from .changes import as_row, as_value


def entropy(context: Context) -> Result:
    """Fit H_N = alpha log N + beta, texts resampled."""
    runs = context.runs
    fit = qaxis.fit_entropy_scaling(runs.lengths, runs.entropy, seed=context.seed)
    last = runs.entropy[:, -1]
    values = {
        "alpha": value(fit.alpha, "", n=fit.samples, low=fit.alpha_low, high=fit.alpha_high),
        "beta": value(fit.beta, "nats", n=fit.samples),
        "r_squared": value(fit.r_squared, "", n=len(runs.lengths)),
        "longest": value(runs.lengths[-1], "tokens"),
        "shortest": value(runs.lengths[0], "tokens"),
        "entropy_longest": value(float(last.mean()), "nats", n=len(last)),
        "support_longest": value(math.exp(float(last.mean())), "keys", n=len(last)),
    }
    headline = f"alpha = {fit.alpha:.3f} [{fit.alpha_low:.3f}, {fit.alpha_high:.3f}], R2 = {fit.r_squared:.3f}"
    data = {"lengths": runs.lengths, "entropy": np.round(runs.entropy, 6).tolist()}
    # Descriptive: the law is reported as found. What may not happen is an impossible entropy.
    possible = bool((runs.entropy > 0).all() and (runs.entropy < np.log(runs.lengths)).all())
    verdict = "entropies lie in (0, log N)" if possible else "an entropy outside (0, log N)"
    return Result(
        passed=possible, verdict=verdict, headline=headline, values=values, cases=runs.entropy.size, data=data
    )


@torch.inference_mode()
def longer_range(context: Context) -> Result:
    """The same fit over two ranges of N on the same texts: alpha belongs to its range."""
    count, tokens = (2, 1024) if context.quick else (15, 8192)
    model, texts = context.subjects.model, context.texts(count, tokens)
    lengths = lengths_upto(tokens)
    found = np.array([entropies(model, ids, lengths) for ids in context.progress(texts, "texts")])
    values, rows = {}, []
    for longest in (tokens // 4, tokens):
        some = [n for n in lengths if n <= longest]
        fit = qaxis.fit_entropy_scaling(some, found[:, : len(some)], seed=context.seed)
        values[f"alpha_{longest}"] = value(fit.alpha, "", n=fit.samples, low=fit.alpha_low, high=fit.alpha_high)
        rows.append({"longest": longest, "alpha": fit.alpha, "beta": fit.beta, "r_squared": fit.r_squared})
    values |= {"longest": value(tokens, "tokens"), "shorter": value(tokens // 4, "tokens")}
    possible = bool((found > 0).all() and (found < np.log(lengths)).all())
    return Result(
        passed=possible,
        verdict="entropies lie in (0, log N)" if possible else "an entropy outside (0, log N)",
        headline=", ".join(f"alpha = {r['alpha']:.3f} up to N = {r['longest']}" for r in rows),
        values=values,
        cases=found.size,
        data={"lengths": lengths, "entropy": np.round(found, 6).tolist(), "rows": rows},
    )


def perplexity_cost(context: Context) -> Result:
    """dPPL of the default budget on the tokens at positions (N/2, N], for every N above the minimum budget."""
    runs = context.runs
    lengths = [n for n in runs.lengths if n >= 128]
    values, rows = {}, []
    for n in lengths:
        part = slice(n // 2 - 1, n - 1)
        change = qaxis.paired_change([x[part] for x in runs.dense], [x[part] for x in runs.sparse], seed=context.seed)
        values[f"change{n}"] = as_value(change)
        rows.append({"n": n, **as_row(change)})
    # Up to 64 keys the budget keeps every key: there, sparse must be the dense model up to rounding.
    whole = max(float((a[:63] - b[:63]).abs().max()) for a, b in zip(runs.dense, runs.sparse, strict=True))
    values["whole_budget_difference"] = value(whole, "nats", n=63 * len(runs.dense))
    changed = any(float((a - b).abs().max()) > 1e-3 for a, b in zip(runs.dense, runs.sparse, strict=True))
    return Result(
        passed=whole < 1e-2 and changed,
        verdict=f"where k_eff = N losses differ by at most {whole:.1e} nats",
        headline=", ".join(f"N={r['n']}: {r['change']:+.2f} %" for r in rows),
        values=values,
        cases=len(rows),
        data={"rows": rows},
    )

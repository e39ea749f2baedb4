"""What completion is measured with: every way against plain float64, runs that go on, the report."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import qaxis
from benchmarks import completing, completion
from benchmarks.completing import Exact, Layer, Rows, Share, Way, attend, budgeted
from benchmarks.completion import DENSE, Plan
from qaxis.storage.formats import FORMATS
from selfcheck.rivals.schemes import of_format
from selfcheck.rivals.streaming import streaming

HEADS, GROUPED, N, DIM = 2, 2, 300, 16
BUDGET = qaxis.Budget(0.1, 8)
EXACT = Exact(budgeted(BUDGET))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of queries, none a multiple of a group."""
    monkeypatch.setitem(completing.ELEMENTS, "cpu", HEADS * GROUPED * N * 100)


def layer(m: int = N, n: int = N) -> Layer:
    """Queries and keys with a direction in common, and values that go with keys: something to fit."""
    random = torch.Generator().manual_seed(5)
    q = torch.randn(HEADS, GROUPED, m, DIM, generator=random) + 1
    k = torch.randn(HEADS, n, DIM, generator=random) * 2 + 0.5
    return Layer(q, k, k[..., :8] / 4 + torch.randn(HEADS, n, 8, generator=random), DIM**-0.5)


def mean(x):
    return x.mean(0)


def stand_ins(kind: str, k: torch.Tensor, v: torch.Tensor, score: torch.Tensor, x: Layer, h: int):
    """What stands for the value of every key a query of KV head ``h`` sees, ``[n, Dv]``, written out."""
    n, full = len(k), len(k) // 128 * 128
    if kind == "recent":
        return mean(v[-completing.RECENT :]).expand_as(v)
    if kind in ("mean", "linear"):
        line = mean(v[:full]).expand_as(v).clone()
        if kind == "linear":
            away = score[:full] - score[:full].mean()
            slope = away @ v[:full] / away.square().sum()
            line += (score - score[:full].mean())[:, None] * slope
        return line
    if kind == "clusters":
        which = completing.clusters(x.k, N // 64)[h, :n]
        out = mean(v[:full] if full else v).expand_as(v).clone()
        for c in which[:full].unique():
            out[which == c] = mean(v[:full][which[:full] == c])
        return out
    size = 64 if kind == "block 64 + slope" else int(kind.split()[1])
    out, rise, square = torch.empty_like(v), torch.zeros(v.shape[1], dtype=v.dtype), 0.0
    for start in range(0, n, size):
        some = slice(start, min(start + size, n))
        out[some] = mean(v[some])
        if some.stop - start == size:
            if kind.startswith("weighted"):
                w = (k[some] @ x.q[h, :, some].double().mean((0, 1)) * x.scale).softmax(0)
                out[some] = w @ v[some]
            away = score[some] - score[some].mean()
            rise, square = rise + away @ v[some], square + away.square().sum()
    if kind.endswith("slope") and square:
        for start in range(0, n, size):
            some = slice(start, min(start + size, n))
            out[some] += (score[some] - score[some].mean())[:, None] * rise / square
    return out


def direct(x: Layer, kind: str) -> torch.Tensor:
    """The output of every query, one after the other, in float64."""
    m, n = x.q.shape[2], x.k.shape[1]
    q, k, v = (y.double() for y in x[:3])
    out = torch.empty(*x.q.shape[:3], x.v.shape[-1], dtype=torch.float64)
    for h in range(HEADS):
        for g in range(GROUPED):
            for i in range(m):
                seen = n - m + i + 1
                score = k[h, :seen] @ q[h, g, i]
                p = ((score - score.max()) * x.scale).exp()
                kept = torch.zeros(seen, dtype=torch.bool)
                kept[score.topk(BUDGET.k_eff(seen)).indices] = True
                values = v[h, :seen]
                if kind == "none" or (kind in ("mean", "linear") and seen < 128):
                    p = p * kept
                else:
                    stand = stand_ins(kind, k[h, :seen], values, score, x, h)
                    values = torch.where(kept[:, None], values, stand)
                out[h, g, i] = p @ values / p.sum()
    return out


@pytest.mark.parametrize("kind", ["none", *completing.PACKAGE, *completing.KINDS])
def test_every_completion_is_what_it_says(kind):
    x = layer()
    right = direct(x, kind)
    assert float((attend(x, Way(EXACT, kind)) - right).abs().max()) < 2e-5
    if kind != "none":
        assert float((direct(x, "none") - right)[:, :, 200:].abs().max()) > 1e-2


def test_the_packages_own_kinds_are_the_packages():
    x = layer(m=20)
    for kind in ("none", *completing.PACKAGE):
        q, k, v = x.q.flatten(0, 1)[None], x.k[None], x.v[None]
        right = qaxis.topk_attention(q, k, v, BUDGET, backend="reference", completion=kind).output[0]
        assert float((attend(x, Way(EXACT, kind)).flatten(0, 1) - right).abs().max()) < 2e-5


def test_a_line_from_moments_is_the_line_from_scores():
    """Own masses of an exact selection are the exact ones, and the fit needs no score of any key."""
    x = layer()
    both = [attend(x, Way(EXACT, kind)) for kind in ("own mass", "linear")]
    assert float((both[0] - both[1]).abs().max()) < 2e-5

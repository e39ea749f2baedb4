"""Budgets with a tolerance: as many keys as a query needs, no more."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qaxis
from qaxis.attention.selection import allowed_keys


def _qkv(heads: int, kv: int, m: int, n: int, dim: int = 16, seed: int = 0) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(2, h, x, dim, generator=made) * 2 for h, x in ((heads, m), (kv, n), (kv, n))]


def _left_out(q: torch.Tensor, k: torch.Tensor, kept: torch.Tensor, causal: bool) -> torch.Tensor:
    """The share of the softmax mass, float64 ``[B, H, M]``, of keys that are not kept."""
    n, group = k.shape[2], q.shape[1] // k.shape[1]
    logit = q.double() @ k.double().repeat_interleave(group, 1).transpose(-1, -2) / math.sqrt(q.shape[3])
    p = torch.softmax(logit.masked_fill(~allowed_keys(q, k, causal), -math.inf), -1)
    mask = torch.zeros(*p.shape[:3], n + 1, dtype=torch.bool).scatter(-1, torch.where(kept < 0, n, kept), True)
    return p.masked_fill(mask[..., :n], 0.0).sum(-1)


@settings(max_examples=25, deadline=None)
@given(
    share=st.sampled_from([0.001, 0.01, 0.1, 0.5, 0.9]), m=st.integers(1, 9), more=st.integers(0, 60),
    kv=st.sampled_from([1, 2]), causal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_fewest_keys_whose_rest_is_within_the_tolerance(
    share: float, m: int, more: int, kv: int, causal: bool, seed: int
) -> None:
    q, k, _ = _qkv(2, kv, m, m + more, seed=seed)
    kept = qaxis.topk_indices(q, k, qaxis.Budget(0, 1, share), causal=causal)
    assert bool((_left_out(q, k, kept, causal) <= share + 1e-6).all())
    # One key less of any query would leave out more; its lowest is the last that was taken.
    counts = (kept >= 0).sum(-1)
    for b, h, i in (counts > 1).nonzero().tolist():
        fewer = qaxis.topk_indices(
            q[b : b + 1, h : h + 1, i : i + 1], _keys(q, k, b, h, i, causal), int(counts[b, h, i]) - 1
        )
        rest = _left_out(q[b : b + 1, h : h + 1, i : i + 1], _keys(q, k, b, h, i, causal), fewer, True)
        assert float(rest) > share - 1e-6


def _keys(q: torch.Tensor, k: torch.Tensor, b: int, h: int, i: int, causal: bool) -> torch.Tensor:
    seen = k.shape[2] - (q.shape[2] - 1 - i if causal else 0)
    return k[b : b + 1, h // (q.shape[1] // k.shape[1]), None, :seen]


def test_never_fewer_than_the_budget_and_the_same_with_every_backend() -> None:
    q, k, v = _qkv(4, 2, 5, 70)
    budget = qaxis.Budget(0.2, 4, 0.3)
    found = [qaxis.topk_attention(q, k, v, budget, backend=name) for name in ("reference", "triton")]
    assert torch.equal(found[0].indices, found[1].indices) and torch.equal(found[0].output, found[1].output)
    least = budget.of(allowed_keys(q, k, True))
    assert bool(((found[0].indices >= 0).sum(-1) >= least).all())
    alone = (qaxis.topk_indices(q, k, qaxis.Budget(0, 1, 0.3)) >= 0).sum(-1)
    assert torch.equal((found[0].indices >= 0).sum(-1), torch.maximum(alone, least.expand_as(alone)))


def test_depends_on_the_scale_only_with_a_tolerance() -> None:
    q, k, _ = _qkv(2, 2, 3, 50)
    sharp, flat = (qaxis.topk_indices(q, k, qaxis.Budget(0, 1, 0.1), scale=scale) for scale in (2.0, 0.01))
    assert int((sharp >= 0).sum()) < int((flat >= 0).sum())
    assert torch.equal(*(qaxis.topk_indices(q, k, 7, scale=scale) for scale in (2.0, 0.01)))


def test_equal_scores_need_their_share_of_keys() -> None:
    q, k = torch.zeros(1, 1, 1, 8), torch.randn(1, 1, 200, 8)
    # Exactly a tenth may be left out: 20 of 200.
    assert qaxis.topk_indices(q, k, qaxis.Budget(0, 1, 0.1)).shape[-1] == 180
    assert qaxis.topk_indices(q, k, qaxis.Budget(0, 1, 0.0999)).shape[-1] == 181


@pytest.mark.parametrize("share", [0, 1, -0.1, 1e-7, True, "0.1", math.nan, math.inf])
def test_refused(share: object) -> None:
    with pytest.raises(ValueError, match="tolerance="):
        qaxis.Budget(0.1, 64, share)  # type: ignore[arg-type]

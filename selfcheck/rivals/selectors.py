"""Run a model with its top-k keys chosen by another score than the canonical one, to see what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import qaxis
from qaxis.arithmetic import reference as canonical
from qaxis.attention.selection import causal_mask

from .attending import attending, register

ROWS = 1024


def other_scores(q: torch.Tensor, k: torch.Tensor, which: str) -> torch.Tensor:
    """Canonical scores of the computed unit query, or of the query with the score rounded to bfloat16."""
    if which == "unit":
        # A zero query has no axis; its scores are zeros either way.
        q = torch.where((q == 0).all(-1, keepdim=True), 1.0, q.float())
        q, k = qaxis.unit_query(q), k.float()
    if q.is_cuda:
        from qaxis.attention import triton as kernels

        score = kernels.scores(q, k)
    else:
        score = canonical.scores(q, k)
    return score.bfloat16().float() if which == "bf16" else score


def _forward(which: str) -> Any:
    def forward(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
        scaling: float | None = None, **_: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        m, n, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
        allowed = causal_mask(m, n, query.device)
        table = qaxis.Budget().table(n, query.device)
        position = torch.arange(n, device=query.device)
        out = torch.empty_like(query)
        keys, values = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        for start in range(0, m, ROWS):
            rows = slice(start, start + ROWS)
            key_of = canonical.sort_key(other_scores(query[:, :, rows], key, which)).to(torch.int64)
            word = torch.where(allowed[:, :, rows], (key_of << 32) | (n - 1 - position), torch.iinfo(torch.int64).min)
            k_eff = table[allowed[:, :, rows].sum(-1)]
            best = torch.topk(word, int(k_eff.max()), dim=-1).values
            # The k-th best word is the threshold: all words differ, so exactly k_eff of them reach it.
            least = best.gather(-1, (k_eff - 1).expand(best.shape[:-1])[..., None])
            out[:, :, rows] = torch.nn.functional.scaled_dot_product_attention(
                query[:, :, rows], keys, values, attn_mask=word >= least, scale=scaling
            )
        return out.transpose(1, 2).contiguous(), None

    return forward


for _which in ("unit", "bf16"):
    register(f"selfcheck_{_which}", _forward(_which))


@contextmanager
def selecting(model: Any, name: str) -> Iterator[None]:
    """``"dense"``, ``"canonical"`` (qaxis itself), ``"unit"`` or ``"bf16"``; the default budget; whole windows only."""
    if name == "dense":
        yield
    elif name == "canonical":
        with qaxis.sparse(model, qaxis.Budget(), exactness="selection"):
            yield
    else:
        with attending(model, f"selfcheck_{name}"):
            yield

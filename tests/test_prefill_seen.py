"""What a query of a prefill sees: padding, windows, later chunks, keys always kept; and what logits become."""

from __future__ import annotations

import itertools

import pytest
import torch

import qaxis
from qaxis.attention import backend as door
from qaxis.attention.always import NONE, Always
from qaxis.attention.logits import Logits
from qaxis.budget import as_budget
from qaxis.cuda import emulator
from qaxis.prefill import PrefillTuning, prefill_attention, selected_positions

needs_compiler = pytest.mark.skipif(not emulator.available(), reason="g++ is needed to emulate CUDA")
both_backends = pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=needs_compiler)])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def bell(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def qkv(b=2, h=2, kv=1, m=6, n=60, d=32, dtype=torch.float32):
    return bell(b, h, m, d, dtype=dtype), bell(b, kv, n, d, seed=1, dtype=dtype), bell(b, kv, n, d, seed=2, dtype=dtype)


def seen(b, m, n, causal=True, pads=None, window=None):
    """The mask of the keys that each query sees, bool ``[B, 1, M, N]``."""
    end = torch.arange(n - m, n)[:, None] + 1 if causal else torch.full((m, 1), n)
    j = torch.arange(n)
    mask = (j < end) & (j >= end - (window or n))
    first = torch.tensor([0] * b if pads is None else [int(x) for x in pads])
    return (mask[None] & (j >= first[:, None, None]))[:, None].to(DEVICE)


def check(q, k, v, budget, backend, *, logits=None, always=NONE, tuning=None, **what):
    """Selection and output against the reference under the same mask."""
    out = prefill_attention(
        q, k, v, budget, selection=True, backend=backend, logits=logits, always=always,
        tuning=tuning or PrefillTuning(wide_programs=4), **what,
    )  # fmt: skip
    allowed = seen(q.shape[0], q.shape[2], k.shape[2], **what)
    k_eff = as_budget(budget, k.shape[2]).of(allowed)
    indices = door.select(q, k, allowed, k_eff, backend="reference", always=always)
    found = selected_positions(out.bits)
    width = max(found.shape[-1], indices.shape[-1])
    found, wanted = (torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=-1) for x in (found, indices))
    assert torch.equal(found, wanted.expand_as(found))
    exact = door.attend(q, k, v, indices, logits or Logits(q.shape[3] ** -0.5), backend="reference")
    atol = {torch.float32: 2.0**-10, torch.float16: 2.0**-6, torch.bfloat16: 2.0**-5}[q.dtype]
    assert torch.allclose(out.output.float(), exact.float(), atol=atol * float(v.float().abs().max()))
    assert bool((out.output[~allowed.any(-1).expand(out.output.shape[:3])] == 0).all())
    return out


KINDS = [
    ("pads", {"pads": [0, 7]}),
    ("a row that sees nothing", {"pads": [60, 57]}),
    ("a tensor of pads", {"pads": torch.tensor([3, 0])}),
    ("window", {"window": 20}),
    ("window of one", {"window": 1}),
    ("a window wider than all", {"window": 500}),
    ("both", {"pads": [50, 4], "window": 30}),
    ("not causal", {"causal": False, "pads": [0, 9], "window": 33}),
]
SINKS = bell(2, seed=5) * 3
LOGITS = [None, Logits(0.3, soft_cap=2.0), Logits(0.2, sink=SINKS), Logits(0.2, soft_cap=5.0, sink=SINKS + 40)]


@both_backends
@pytest.mark.parametrize("what", [w for _, w in KINDS], ids=[n for n, _ in KINDS])
def test_the_selection_is_that_of_what_is_seen(what, backend):
    what = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in what.items()}
    check(*qkv(), qaxis.Budget(0.2, 4), backend, **what)


@both_backends
@pytest.mark.parametrize("logits", LOGITS[1:], ids=["cap", "sink", "cap and a high sink"])
@pytest.mark.parametrize("pads", [None, [58, 3]])
def test_logits_change_outputs_not_the_selection(logits, pads, backend):
    check(*qkv(), 5, backend, logits=logits, pads=pads)


@both_backends
@pytest.mark.parametrize("always", [Always(2, 0), Always(0, 3), Always(2, 3), Always(4, 4)])
@pytest.mark.parametrize("what", [{}, {"window": 20}, {"pads": [55, 2]}], ids=["all", "window", "pads"])
def test_what_is_always_kept_counts(what, always, backend):
    check(*qkv(), qaxis.Budget(0.2, 8), backend, always=always, **what)


@both_backends
def test_a_key_that_is_not_ranked_does_not_decide_the_scale_of_the_softmax(backend):
    """Where the budget is what is always kept, the best of the others is far above all that are kept."""
    q, k, v = qkv(b=1, h=1, m=4, n=40)
    k[:, :, 20] = q[:, :, 1:2] * 60
    check(q, k, v, 6, backend, always=Always(2, 4))


@both_backends
@pytest.mark.parametrize("window, pads", list(itertools.product([300, 700], [None, [0, 1500]])))
def test_windows_of_later_stretches_have_an_origin_of_their_own(window, pads, backend):
    if backend == "triton":
        window = window // 2
    q, k, v = qkv(m=3, n=2600)
    check(q, k, v, qaxis.Budget(0.1, 8), backend, window=window, pads=pads)


@both_backends
def test_stretches_and_chunks_select_the_same(backend):
    q, k, v = qkv(b=1, h=2, m=7, n=1300)
    tuning = PrefillTuning(memory=60000, wide_programs=1)
    check(q, k, v, qaxis.Budget(0.1, 8), backend, window=40, tuning=tuning)
    check(q, k, v, qaxis.Budget(0.1, 8), backend, pads=[1290], tuning=tuning)


@needs_compiler
@pytest.mark.parametrize("pads", [[0, 250], [255, 1300], [511, 4000]])
@pytest.mark.parametrize("always", [NONE, Always(3, 40)])
def test_select_cu_begins_anywhere_in_a_block(pads, always):
    q, k, v = qkv(m=2, n=4100)
    check(q, k, v, qaxis.Budget(0.1, 64), "cuda", pads=pads, always=always)

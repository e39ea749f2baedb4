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
from qaxis.prefill import cuda as selection_on_cuda

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
LOGITS += [Logits(0.2, sink=torch.stack([SINKS, SINKS - 9.0], 1)[:, 0])]


@both_backends
@pytest.mark.parametrize("what", [w for _, w in KINDS], ids=[n for n, _ in KINDS])
def test_the_selection_is_that_of_what_is_seen(what, backend):
    what = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in what.items()}
    check(*qkv(), qaxis.Budget(0.2, 4), backend, **what)


@both_backends
@pytest.mark.parametrize("logits", LOGITS[1:], ids=["cap", "sink", "cap and a high sink", "strided sink"])
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
def test_tiles_that_nobody_attends_to_may_be_left_out(backend):
    q, k, v = qkv(b=1, h=1, m=3, n=600)
    q[..., 0], k[:, :, 64:500, 0] = 9, -9
    tuning = PrefillTuning(attend_skip=2, attend_keys=32, wide_programs=1)
    check(q, k, v, 20, backend, tuning=tuning, logits=Logits(0.2, sink=SINKS[:1]))


@both_backends
def test_stretches_and_chunks_select_the_same(backend):
    q, k, v = qkv(b=1, h=2, m=7, n=1300)
    tuning = PrefillTuning(memory=60000, wide_programs=1)
    check(q, k, v, qaxis.Budget(0.1, 8), backend, window=40, tuning=tuning)
    check(q, k, v, qaxis.Budget(0.1, 8), backend, pads=[1290], tuning=tuning)


@needs_compiler
@pytest.mark.parametrize("pads", [[250, 2590], [255, 1300]])
@pytest.mark.parametrize("always", [NONE, Always(3, 40)])
def test_select_cu_begins_anywhere_in_a_block(pads, always):
    q, k, v = qkv(h=1, m=1, n=2600)
    check(q, k, v, qaxis.Budget(0.1, 64), "cuda", pads=pads, always=always)


# ---- how select.cu shares a row -------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("in_global", [False, True])
@pytest.mark.parametrize("kind", ["normal", "all tie", "window", "crowded"])
def test_a_team_of_warps_selects_the_same(kind, in_global, monkeypatch):
    if in_global:
        monkeypatch.setattr(selection_on_cuda, "SHARED_LIMIT", 1000)
    q, k, v = qkv(b=1, h=1, m=1, n=3400, dtype=torch.bfloat16)
    what = {"window": 3000, "pads": [700], "always": Always(2, 9)} if kind == "window" else {}
    if kind == "all tie":
        q = q * 0
    elif kind == "crowded":
        # Some 100 keys within an error of the cut.
        k = k[:, :, :34].repeat(1, 1, 100, 1)
    tuning = PrefillTuning(wide_programs=1, select_warps=100)
    spans = 4
    assert selection_on_cuda.shape_of(spans, 128, 100).in_global == in_global
    assert selection_on_cuda.shape_of(spans, 128, 100).team > 1
    check(q, k, v, qaxis.Budget(0.1, 16), "cuda", tuning=tuning, **what)


@pytest.mark.parametrize("capacity", [128, 1024])
@pytest.mark.parametrize("kind", ["normal", "window", "all tie", "a rounding apart"])
def test_triton_selects_the_same_from_rows_of_many_blocks(kind, capacity):
    q, k, v = qkv(b=1, h=1, m=2, n=700)
    what = {"window": 600, "pads": [139], "always": Always(3, 9)} if kind == "window" else {}
    if kind == "all tie":
        q = q * 0
    elif kind == "a rounding apart":
        # Their order is that of the canonical sums: another tree, or fused products, would give another.
        k = k[:, :, :1] * (1 + 2.0**-22 * k)
    tuning = PrefillTuning(wide_programs=1, cut=128, capacity=capacity)
    check(q, k, v, qaxis.Budget(0.1, 16), "triton", tuning=tuning, **what)


def test_rows_share_a_multiprocessor():
    for spans, wanted in itertools.product((1, 4, 8, 9, 16, 32, 64, 100, 104, 128, 1024), (1, 8, 12, 16, 24)):
        for capacity in (128, 512):
            shape = selection_on_cuda.shape_of(spans, capacity, wanted)
            assert shape.team in (1, shape.warps) and shape.warps <= 16
            assert shape.shared <= selection_on_cuda.SHARED_LIMIT
            programs = selection_on_cuda.SHARED // (shape.shared + selection_on_cuda.SHARED_OF_PROGRAM)
            assert programs * shape.warps >= wanted or shape.warps == 16
    assert selection_on_cuda.shape_of(8, 128, 12) == (4, 1, selection_on_cuda.shape_of(8, 128, 12).shared, False)
    assert selection_on_cuda.shape_of(128, 512, 12).in_global


# ---- keys of any length ---------------------------------------------------------------------------------------------


def lengthened(kind, q, k):
    """Keys of which some are long; q and k of one head."""
    n = k.shape[2]
    if kind == "one, 30 times":
        k[:, :, n // 3] *= 30
    elif kind == "one, a million times":
        k[:, :, n // 3] *= 1e6
    elif kind == "against a query":
        k[:, :, n // 3] = -1000 * q[:, :, 0]
    elif kind == "along a query":
        k[:, :, n // 3] = 1000 * q[:, :, 0]
    elif kind == "one in 64":
        k[:, :, ::64] *= 30
    elif kind == "one in 5":
        k[:, :, ::5] *= 30
    elif kind == "graded":
        k *= torch.exp(1.5 * bell(n, seed=7))[:, None]
    elif kind == "long ones tie":
        k[:, :, ::32] = k[:, :, :1] * 100
    elif kind == "the cut among the long":
        k[:, :, ::20] *= 100 * torch.linspace(1, 1.001, len(k[0, 0, ::20]))[:, None].to(DEVICE)
    elif kind == "all others are zero":
        k[:, :, 1:] = 0
    elif kind == "too long for squares":
        k[:, :, n // 3] *= 1e18 / k[:, :, n // 3].abs().max()
    return k


LENGTHS = [
    "one, 30 times", "one, a million times", "against a query", "along a query", "one in 64", "one in 5", "graded",
    "long ones tie", "the cut among the long", "all others are zero", "too long for squares",
]  # fmt: skip


@both_backends
@pytest.mark.parametrize("kind", LENGTHS)
def test_keys_of_any_length_are_in_canonical_order(kind, backend):
    q, k, v = qkv(b=1, h=1, m=2, n=400)
    tuning = PrefillTuning(wide_programs=1, long_rows=2)
    check(q, lengthened(kind, q, k), v, qaxis.Budget(0.05, 8), backend, tuning=tuning)


@both_backends
def test_one_long_key_leaves_the_bands_as_they_are(backend):
    q, k, v = qkv(b=1, h=1, m=2, n=400)
    tuning = PrefillTuning(wide_programs=1, long_rows=2)
    plain = check(q, k, v, 40, backend, tuning=tuning)
    k[:, :, 100] *= 1000
    long = check(q, k, v, 40, backend, tuning=tuning)
    assert int(long.band.max()) <= 2 * int(plain.band.max()) + 8


@both_backends
def test_long_keys_in_windows_and_behind_padding(backend):
    q, k, v = qkv(m=3, n=1300)
    k[:, :, [5, 1250, 1298]] *= 100
    tuning = PrefillTuning(wide_programs=1, long_rows=2)
    check(q, k, v, qaxis.Budget(0.1, 8), backend, window=60, pads=[0, 1251], always=Always(1, 2), tuning=tuning)

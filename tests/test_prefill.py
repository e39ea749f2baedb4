"""Prefill outside its claims: every form that is refused, every layout that is read, how memory is bounded."""

from __future__ import annotations

import math

import pytest
import torch

import qaxis
from qaxis.cuda import emulator
from qaxis.prefill import PrefillTuning, prefill_attention, selected_positions

needs_compiler = pytest.mark.skipif(not emulator.available(), reason="g++ is needed to emulate CUDA")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="one program a row: too many to interpret")
both_backends = pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=needs_compiler)])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def bell(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def qkv(b=1, h=2, kv=1, m=4, n=40, d=32, dtype=torch.float32):
    return bell(b, h, m, d, dtype=dtype), bell(b, kv, n, d, seed=1, dtype=dtype), bell(b, kv, n, d, seed=2, dtype=dtype)


def check(q, k, v, budget, backend, causal=True, tuning=PrefillTuning()):
    """The selection is the canonical one and the output close to it, compared on contiguous copies."""
    out = prefill_attention(q, k, v, budget, causal=causal, selection=True, backend=backend, tuning=tuning)
    exact = qaxis.topk_attention(*(x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)), budget, causal=causal)
    assert torch.equal(selected_positions(out.bits), exact.indices)
    atol = {torch.float32: 2.0**-10, torch.float16: 2.0**-6, torch.bfloat16: 2.0**-5}[q.dtype]
    assert out.output.dtype == q.dtype
    assert torch.allclose(out.output.float(), exact.output.float(), atol=atol * float(v.float().abs().max()))


# ---- what is refused ------------------------------------------------------------------------------------------------

Q, K, V = (1, 2, 4, 32), (1, 2, 50, 32), (1, 2, 50, 32)
MISMATCHES = [
    ("k.shape[3]", {"k": torch.zeros(1, 2, 50, 16)}),
    ("k.shape[0]", {"k": torch.zeros(2, 2, 50, 32), "v": torch.zeros(2, 2, 50, 32)}),
    ("q.shape[1]", {"q": torch.zeros(1, 3, 4, 32)}),
    ("q.shape[1]", {"k": torch.zeros(1, 4, 50, 32), "v": torch.zeros(1, 4, 50, 32)}),
    ("q.shape[2]", {"q": torch.zeros(1, 2, 51, 32)}),
    ("v.shape[:3]", {"v": torch.zeros(1, 2, 49, 32)}),
    ("v.shape[:3]", {"v": torch.zeros(1, 2, 51, 32)}),
    ("v.shape[:3]", {"v": torch.zeros(1, 1, 50, 32)}),
    ("v.shape[:3]", {"v": torch.zeros(2, 2, 50, 32)}),
    ("k.dtype", {"k": torch.zeros(K, dtype=torch.float16)}),
    ("v.dtype", {"v": torch.zeros(V, dtype=torch.bfloat16)}),
    ("q.dtype", {"q": torch.zeros(Q, dtype=torch.float64)}),
    ("k.device", {"k": torch.zeros(K, device="meta")}),
    ("v.device", {"v": torch.zeros(V, device="meta")}),
    *[(f"{name}.shape", {name: torch.zeros(2, 50, 32)}) for name in "qkv"],
    *[
        (f"{name}.shape", {name: torch.zeros([0 if i == at else s for i, s in enumerate(shape)])})
        for name, shape in (("q", Q), ("k", K), ("v", V))
        for at in range(4)
    ],
    *[(f"{name}.layout", {name: torch.zeros(Q).to_sparse()}) for name in "qkv"],
    *[(name, {name: [[[[0.0]]]]}) for name in "qkv"],
    ("budget", {"budget": 0}),
    ("budget", {"budget": 51}),
    ("budget", {"budget": 0.1}),
    ("scale", {"scale": 0.0}),
    ("scale", {"scale": math.nan}),
    ("backend", {"backend": "fast"}),
    ("tuning", {"tuning": 128}),
]


@pytest.mark.parametrize("argument, changed", MISMATCHES, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_what_does_not_fit_is_refused_by_name(argument, changed):
    given = {"q": torch.zeros(Q), "k": torch.zeros(K), "v": torch.zeros(V), "budget": 10} | changed
    with pytest.raises(ValueError) as refused:
        prefill_attention(**given)
    assert str(refused.value).startswith(f"{argument}=")


@pytest.mark.parametrize(
    "argument, bits",
    [
        ("bits", None),
        ("bits.dtype", torch.zeros(1, 1, 1, 1, dtype=torch.int64)),
        ("bits.shape", torch.zeros(1, 1, 1, dtype=torch.int32)),
        ("bits.shape", torch.zeros(1, 1, 0, 1, dtype=torch.int32)),
        ("bits.shape", torch.zeros(1, 1, 1, 0, dtype=torch.int32)),
        ("bits.layout", torch.zeros(1, 1, 1, 1, dtype=torch.int32).to_sparse()),
    ],
)
def test_bits_that_are_none_are_refused(argument, bits):
    with pytest.raises(ValueError) as refused:
        selected_positions(bits)
    assert str(refused.value).startswith(f"{argument}=")


# ---- what is selected -----------------------------------------------------------------------------------------------


@both_backends
def test_prefill_in_chunks_selects_the_canonical_sets(backend):
    q, k, v = bell(2, 4, 60, 32), bell(2, 2, 300, 32, seed=1), bell(2, 2, 300, 32, seed=2)
    check(q, k, v, qaxis.Budget(0.1, 8), backend, tuning=PrefillTuning(chunk=32))


@needs_compiler
@pytest.mark.parametrize(
    "n, kind",
    # Lists that are short, or overflow; a sample first; a row that fills a program's shared memory by itself.
    [(n, kind) for n in (60, 300) for kind in ("normal", "zero query", "few that differ", "one long key")]
    + [(2600, "normal"), (9000, "normal")],
)
def test_select_cu_at_any_length(n, kind):
    q, k = bell(1, 2, 4, 64), bell(1, 1, n, 64, seed=1)
    if kind == "zero query":
        q = q * 0
    elif kind == "few that differ":
        k = k[:, :, :3].repeat(1, 1, -(-n // 3), 1)[:, :, :n].contiguous()
    elif kind == "one long key":
        k[:, :, n // 2] *= 300
    out = prefill_attention(q, k, k, n // 10, selection=True, backend="cuda")
    assert torch.equal(selected_positions(out.bits), qaxis.topk_indices(q, k, n // 10, causal=True))


# ---- layouts --------------------------------------------------------------------------------------------------------


def last_dimension_strided(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def heads_behind_positions(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_second_position(x):
    return x.repeat_interleave(2, dim=2)[:, :, ::2]


def row_of_an_odd_stride(x):
    return torch.nn.functional.pad(x, (0, 1))[..., :-1]


def every_second_number(x):
    return x.repeat_interleave(2, dim=3)[..., ::2]


def misaligned(x):
    return torch.nn.functional.pad(x.flatten(), (1, 0))[1:].view(x.shape)


def middle_of_more(x):
    return torch.nn.functional.pad(x, (8, 8, 1, 2, 1, 1, 1, 1))[1:-1, 1:-1, 1:-2, 8:-8]


def reversed_heads_of_one_batch(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = [
    last_dimension_strided, heads_behind_positions, every_second_position, row_of_an_odd_stride, every_second_number,
    misaligned, middle_of_more, reversed_heads_of_one_batch,
]  # fmt: skip


@both_backends
@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_any_layout_gives_the_same(layout, which, backend):
    q, k, v = qkv(dtype=torch.bfloat16)
    changed = [layout(x) if name in which else x for name, x in zip("qkv", (q, k, v), strict=True)]
    assert all(torch.equal(x, y) for x, y in zip(changed, (q, k, v), strict=True))
    expected, out = (prefill_attention(*x, 7, selection=True, backend=backend) for x in ((q, k, v), changed))
    assert all(torch.equal(x, y) for x, y in zip(out[:2], expected[:2], strict=True))
    assert torch.equal(selected_positions(out.bits), qaxis.topk_indices(q, k, 7))


@both_backends
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
def test_expanded_tensors_are_read(which, at, backend):
    q, k, v = qkv(b=2, h=4, kv=2, m=2)
    q, k, v = (
        x[(slice(None),) * at + (slice(1),)].expand(x.shape) if name in which else x
        for name, x in zip("qkv", (q, k, v), strict=True)
    )
    check(q, k, v, 7, backend)


# ---- offsets beyond 2^31 --------------------------------------------------------------------------------------------


def far_apart(x, at):
    """``x`` with a stride along ``at`` that puts its last slice 2^31 numbers behind its first.

    Most of the memory is never touched, so there is none behind it.
    """
    size = x.shape[at]
    inner = [s for i, s in enumerate(x.shape) if i != at]
    strides = [math.prod(inner[i + 1 :]) for i in range(3)]
    strides.insert(at, -(-(1 << 31) // (size - 1) // 64 - 1) * 64 if False else ((1 << 31) // (size - 1) // 64 + 1) * 64)
    try:
        room = torch.empty(strides[at] * (size - 1) + math.prod(inner), dtype=x.dtype, device=x.device)
    except RuntimeError:
        pytest.skip("needs 5 GB of address space")
    return room.as_strided(x.shape, strides).copy_(x)


@both_backends
@pytest.mark.parametrize("at", range(4), ids=["batch", "head", "position", "number"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_offsets_are_64_bit(which, at, backend):
    q, k, v = qkv(b=2, h=4, kv=2, m=5, n=40, dtype=torch.float16)
    q, k, v = (far_apart(x, at) if name == which else x for name, x in zip("qkv", (q, k, v), strict=True))
    check(q, k, v, 7, backend)

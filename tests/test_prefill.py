"""Prefill outside its claims: every form that is refused, every layout that is read, how memory is bounded."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace

import pytest
import torch

import qaxis
from qaxis.attention.always import Always
from qaxis.attention.logits import Logits
from qaxis.budget import as_budget
from qaxis.cuda import emulator
from qaxis.prefill import Prefill, PrefillTuning, prefill_attention, selected_positions
from qaxis.prefill import cuda as selection_on_cuda
from qaxis.prefill.attention import fill
from qaxis.prefill.cuda import row_selector
from qaxis.prefill.plan import (
    DEFAULT_TUNING,
    MOST_HEADS,
    MOST_KEYS,
    Buffers,
    Frame,
    Part,
    Ranges,
    bytes_of_bits,
    bytes_of_scores,
    make_plan,
    tuning_for,
)

needs_compiler = pytest.mark.skipif(not emulator.available(), reason="g++ is needed to emulate CUDA")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="one program a row: too many to interpret")
both_backends = pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=needs_compiler)])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def bell(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def qkv(b=1, h=2, kv=1, m=4, n=40, d=32, dtype=torch.float32):
    return bell(b, h, m, d, dtype=dtype), bell(b, kv, n, d, seed=1, dtype=dtype), bell(b, kv, n, d, seed=2, dtype=dtype)


def check(q, k, v, budget, backend, causal=True, tuning=DEFAULT_TUNING):
    """The selection is the canonical one and the output close to it, compared on contiguous copies."""
    out = prefill_attention(q, k, v, budget, causal=causal, selection=True, backend=backend, tuning=tuning)
    exact = qaxis.topk_attention(
        *(x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)), budget, causal=causal
    )
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
    ("pads", {"pads": 3}),
    ("pads", {"pads": "4"}),
    ("pads", {"pads": [3, 4]}),
    ("pads", {"pads": [51]}),
    ("pads", {"pads": [-1]}),
    ("pads", {"pads": [1.0]}),
    ("pads.dtype", {"pads": torch.zeros(1)}),
    ("pads.shape", {"pads": torch.zeros(2, dtype=torch.int32)}),
    ("pads.shape", {"pads": torch.zeros(1, 1, dtype=torch.int32)}),
    ("pads.device", {"pads": torch.zeros(1, dtype=torch.int32, device="meta")}),
    ("window", {"window": 0}),
    ("window", {"window": 4.0}),
    ("window", {"window": True}),
    ("logits", {"logits": 0.5}),
    ("scale", {"logits": Logits(0.5), "scale": 0.5}),
    ("scale", {"logits": Logits(-0.5)}),
    ("logits.soft_cap", {"logits": Logits(0.5, soft_cap=0.0)}),
    ("logits.soft_cap", {"logits": Logits(0.5, soft_cap=math.inf)}),
    ("logits.soft_cap", {"logits": Logits(0.5, soft_cap=2.0**127)}),
    ("logits.sink", {"logits": Logits(0.5, sink=[0.0, 0.0])}),
    ("logits.sink.shape", {"logits": Logits(0.5, sink=torch.zeros(3))}),
    ("logits.sink.dtype", {"logits": Logits(0.5, sink=torch.zeros(2, dtype=torch.float64))}),
    ("always", {"always": (1, 2)}),
    ("always.sinks", {"always": Always(-1, 0)}),
    ("always.recent", {"always": Always(0, 1.5)}),
    ("always", {"always": Always(5, 6)}),
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


LAYOUTS = [
    last_dimension_strided, heads_behind_positions, every_second_position, row_of_an_odd_stride, every_second_number,
    misaligned, middle_of_more,
]  # fmt: skip


def change(which, how, tensors):
    """The named ones of q, k and v in another layout."""
    return [how(x) if name in which else x for name, x in zip("qkv", tensors, strict=True)]


@both_backends
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_any_layout_gives_the_same(layout, which, backend):
    q, k, v = qkv(m=2, dtype=torch.bfloat16)
    changed = change(which, layout, (q, k, v))
    assert all(torch.equal(x, y) for x, y in zip(changed, (q, k, v), strict=True))
    expected, out = (prefill_attention(*x, 7, selection=True, backend=backend) for x in ((q, k, v), changed))
    assert all(torch.equal(x, y) for x, y in zip(out[:2], expected[:2], strict=True))
    assert torch.equal(selected_positions(out.bits), qaxis.topk_indices(q, k, 7))


@both_backends
@pytest.mark.parametrize("at", range(4), ids=["batch", "head", "position", "number"])
@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
def test_expanded_tensors_are_read(which, at, backend):
    def expanded(x):
        return x[(slice(None),) * at + (slice(1),)].expand(x.shape)

    check(*change(which, expanded, qkv(b=2, h=2, kv=2, m=1, n=20)), 7, backend)


# ---- offsets beyond 2^31 --------------------------------------------------------------------------------------------


def far_apart(x, at):
    """``x`` with a stride along ``at`` that puts its last slice 2^31 numbers behind its first.

    Most of the memory is never touched, so none is taken.
    """
    inner = [s for i, s in enumerate(x.shape) if i != at]
    strides = [math.prod(inner[i + 1 :]) for i in range(3)]
    strides.insert(at, ((1 << 31) // (x.shape[at] - 1) // 64 + 1) * 64)
    try:
        room = torch.empty(sum((s - 1) * t for s, t in zip(x.shape, strides, strict=True)) + 1, dtype=x.dtype)
    except RuntimeError:
        pytest.skip("needs 5 GB of address space")
    return room.as_strided(x.shape, strides).copy_(x)


FAR = [
    # At least three along the dimension: two would have a stride that is 64-bit by itself.
    pytest.param(0, {"b": 3, "m": 1, "n": 33}, id="batch"),
    pytest.param(1, {"h": 3, "kv": 3, "m": 1, "n": 33}, id="head"),
    pytest.param(2, {"m": 3, "n": 33}, id="position"),
    pytest.param(2, {"m": 3, "n": 129}, id="position in a later tile"),
    pytest.param(3, {"m": 1, "n": 33}, id="number"),
]


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU takes all memory at once")
@both_backends
@pytest.mark.parametrize("at, sizes", FAR)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_offsets_into_tensors_are_64_bit(which, at, sizes, backend):
    tensors = qkv(**{"h": 2, "kv": 2} | sizes, dtype=torch.float16)
    # All keys of the first head tie: a list that is full, or overflows.
    tensors[1][:, 0] = -tensors[0][:, 0, -1:]
    changed = change(which, lambda x: far_apart(x, at), tensors)
    out = prefill_attention(*changed, 7, selection=True, backend=backend)
    expected = prefill_attention(*tensors, 7, selection=True, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(out[:2], expected[:2], strict=True))
    assert torch.equal(selected_positions(out.bits), qaxis.topk_indices(*tensors[:2], 7))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU takes all memory at once")
@both_backends
def test_offsets_into_buffers_are_64_bit(backend, monkeypatch):
    monkeypatch.setattr(Frame, "padded", (1 << 29) + 256)
    q, k, v = qkv(h=1, m=5, n=150)
    # All keys tie: more than a list has room for.
    q[:, :, 4] = 0
    plan = make_plan(tuple(q.shape), 1, 150)
    plan = replace(plan, padded=(1 << 29) + 256, wide_programs=1)
    result = Prefill(torch.empty_like(q), *torch.zeros(2, 1, 1, 5, 5, dtype=torch.int32))
    result = result._replace(band=result.band[..., 0])
    fill(result, plan, q, k, v, as_budget(7), Logits(32**-0.5), backend)
    expected = qaxis.topk_attention(q, k, v, 7)
    assert torch.equal(selected_positions(result.bits), expected.indices)
    assert int(result.band[0, 0, 4]) == 150
    assert torch.allclose(result.output, expected.output, atol=2.0**-10 * float(v.abs().max()))


@needs_gpu
def test_more_than_two_billion_numbers_and_more_heads_than_a_grid_has_room_for():
    q, k = bell(1, 64, 1, 64, dtype=torch.bfloat16), bell(1, 1, 1 << 19, 64, seed=1, dtype=torch.bfloat16)
    # As 64 heads that share one, and as 64 that happen to be the same.
    shared = prefill_attention(q, k, k, 100, selection=True)
    alike = prefill_attention(q, *[k.expand(1, 64, 1 << 19, 64)] * 2, 100, selection=True)
    assert torch.equal(selected_positions(shared.bits), qaxis.topk_indices(q, k, 100))
    assert all(torch.equal(x, y) for x, y in zip(shared[:2], alike[:2], strict=True))
    for shape in ((70000, 1), (3, 30000), (1, 70000)):
        q, k, v = bell(*shape, 2, 32), bell(*shape, 8, 32, seed=1), bell(*shape, 8, 32, seed=2)
        for backend in ("triton", "cuda"):
            check(q, k, v, 3, backend)
            check(q, k[:, :1], v[:, :1], 3, backend)


# ---- memory ---------------------------------------------------------------------------------------------------------

SHAPES = [
    ((1, 32, 8192, 128), 8, 8192), ((1, 32, 131072, 128), 8, 131072), ((64, 32, 4096, 128), 8, 8192),
    ((70000, 1, 16, 32), 1, 16), ((3, 66000, 1, 32), 66000, 50), ((1, 66000, 40, 32), 1, 50),
    ((1, 8, 128, 128), 1, MOST_KEYS), ((2, 4, 300, 32), 2, 300),
]  # fmt: skip


@pytest.mark.parametrize("memory", [4 << 30, 1 << 20])
@pytest.mark.parametrize("window", [MOST_KEYS, 512])
@pytest.mark.parametrize("shape, kv_heads, n", SHAPES)
def test_memory_is_bounded_and_every_head_is_handled_once(shape, kv_heads, n, window, memory):
    plan = make_plan(shape, kv_heads, n, tuning=PrefillTuning(memory=memory), window=window)
    buffers = Buffers(plan, torch.device("meta"))
    sizes = {name: x.numel() * x.element_size() for name, x in vars(buffers).items()}
    lines = sizes.pop("line")
    least = (bytes_of_scores(plan.padded) + bytes_of_bits(plan.words, plan.tuning)) * plan.group
    assert sum(sizes.values()) <= max(memory, least) and lines <= max(memory // 8, 8 * plan.padded)
    # Nor is less in flight than fits.
    rows = plan.heads_at_once * plan.stretch
    assert rows == math.prod(shape[:3]) or sum(sizes.values()) > min(memory, least) / 4 or plan.stretch >= 2048
    batch, heads, _, _ = shape
    covered = torch.zeros(batch, heads, dtype=torch.int8)
    for b, h, kv in plan.parts(batch):
        covered[b, h] += 1
        here, kv_here = covered[b, h].shape[1], len(range(kv_heads)[kv])
        assert here == kv_here * plan.group and covered[b, h].numel() <= plan.heads_at_once
        assert covered[b, h].numel() <= MOST_HEADS or plan.group > MOST_HEADS
    assert bool((covered == 1).all())


@pytest.mark.parametrize("memory", [4 << 30, 1 << 20])
@pytest.mark.parametrize("window", [MOST_KEYS, 512])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape, kv_heads, n", SHAPES)
def test_chunks_cover_every_query_and_fit_into_the_buffers(shape, kv_heads, n, causal, window, memory):
    plan = make_plan(shape, kv_heads, n, tuning=PrefillTuning(memory=memory), window=window, causal=causal)
    buffers, m = Buffers(plan, torch.device("meta")), shape[2]
    # Of a long prompt the two ends.
    stretches = list(itertools.islice(plan.stretches(), 50)) + list(plan.stretches())[-2:]
    for stretch in stretches:
        assert stretch.origin % 1024 == 0 and stretch.first + stretch.origin == n - m + stretch.start
        lowest = (stretch.first + 1 if causal else n - stretch.origin) - window
        assert stretch.origin == 0 or 0 <= lowest < 1024
        assert stretch.words * 32 >= stretch.visible and stretch.words <= plan.words
        chunks = list(plan.chunks(stretch))
        ends = list(itertools.accumulate(c.rows for c in chunks))
        assert [c.start - stretch.start for c in chunks] == [0, *ends[:-1]] and ends[-1] == stretch.rows
        assert chunks[-1].visible == stretch.visible and all(c.origin == stretch.origin for c in chunks)
        assert all(c.first - c.start == stretch.first - stretch.start for c in chunks)
        assert all(plan.heads_at_once * c.rows * c.padded <= buffers.fast.numel() for c in chunks)
    ends = list(itertools.accumulate(s.rows for s in plan.stretches()))
    assert [s.start for s in plan.stretches()] == [0, *ends[:-1]] and ends[-1] == m


@pytest.mark.parametrize("batch, n", [(1, 8192), (1, 32768), (1, 40000), (4, 65536), (1, 131072)])
def test_long_prompts_take_little_memory(batch, n):
    tuning = tuning_for(batch, 32, n, n)
    plan = make_plan((batch, 32, n, 128), 8, n, tuning=tuning)
    taken = sum(x.numel() * x.element_size() for x in vars(Buffers(plan, torch.device("meta"))).values())
    assert taken <= (9 << 26 if n > 32768 else 9 << 27 if n > 16384 else 9 << 28)
    assert tuning_for(batch, 32, 4096, 4096, room=n).memory <= tuning.memory
    # Enough programs of attention, and rows of a selection, for a GPU.
    assert plan.heads_at_once * plan.stretch >= 192 * tuning.attend_queries and plan.heads_at_once * plan.chunk >= 512


@pytest.mark.parametrize("n", [65536, 70000, 131072, 200000])
def test_parts_are_as_large_as_each_other(n):
    """Seven heads and then one would take as long as seven and seven."""
    plan = make_plan((1, 32, 4096, 128), 8, n, tuning=PrefillTuning(memory=448 << 20))
    heads = [kv.stop - kv.start for _, _, kv in plan.parts(1)]
    rows = [stretch.rows for stretch in plan.stretches()]
    assert max(heads) - min(len(range(8)[kv]) for _, _, kv in plan.parts(1)) < len(heads), heads
    assert max(rows) - min(rows) < len(rows) * plan.chunk, rows


@both_backends
@pytest.mark.parametrize(
    "shape, kv, memory, expected",
    # Two batches and then one; a KV head at a time; two queries and then one; one query at a time.
    [
        ((3, 2, 3), 1, 21000, (3, 2)),
        ((1, 4, 3), 2, 12000, (3, 1)),
        ((1, 4, 3), 2, 7000, (2, 1)),
        ((1, 2, 3), 1, 1, (1, 1)),
    ],
)
def test_parts_and_short_chunks_select_the_same(shape, kv, memory, expected, backend):
    b, h, m = shape
    q, k, v = qkv(b, h, kv, m, 60)
    tuning = PrefillTuning(memory=memory)
    plan = make_plan(tuple(q.shape), kv, 60, tuning=tuning)
    assert (plan.chunk, plan.kv_heads_at_once) == expected
    check(q, k, v, 9, backend, tuning=tuning)


def test_what_select_cu_cannot_read_is_left_to_triton():
    def selector(heads=2, visible=40, how=lambda x: x, **tuning):
        q, k = bell(1, 1, 1, 32).expand(1, heads, 1, 32), bell(1, 1, 40, 32)
        plan = make_plan(tuple(q.shape), 1, 40, tuning=PrefillTuning(**tuning))
        ranges = Ranges(*torch.ones(2, 1, 1), torch.zeros(1, 1, 0), torch.zeros(1, 1))
        tensors = (how(q), how(k), how(k))
        return row_selector(Part(plan, None, None, *tensors, ranges, None, Logits(1.0), None, None, None), visible)

    most = selection_on_cuda.MOST_KEYS
    assert selector(heads=MOST_HEADS + 1) is None and selector(visible=most + 1) is None
    assert selector(capacity=16) is None and selector(capacity=256) is None
    assert selector(how=misaligned) is None and selector(how=row_of_an_odd_stride) is None
    assert selector(how=every_second_number) is None and selector(how=lambda x: x[..., :24]) is None
    if emulator.available() or DEVICE == "cuda":
        assert selector() is not None and selector(visible=most) is not None and selector(heads=MOST_HEADS) is not None


@pytest.mark.parametrize(
    "field, x", [(f.name, x) for f in fields(PrefillTuning) for x in (0, -1, 1.5, True)]
    + [("queries", 48), ("capacity", 100), ("attend_keys", 16), ("attend_keys", 256), ("cut", 64)],
)  # fmt: skip
def test_tuning_that_is_none_is_refused(field, x):
    with pytest.raises(ValueError, match=f"tuning.{field}={x}: allowed is"):
        PrefillTuning(**{field: x})

"""Exact in any surroundings: settings of torch, threads, and tensors that hold no numbers of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

import qaxis
from qaxis.arithmetic import reference as canonical
from qaxis.arithmetic.fast_scores import product_scores
from qaxis.arithmetic.rounding import product_error_bound
from qaxis.cuda import emulator
from qaxis.decode import Decoder, index_cache, index_keys
from qaxis.decode.triton_step import TritonStep
from qaxis.prefill import PrefillTuning, prefill_attention, selected_positions
from qaxis.storage.buffer import joined
from qaxis.storage.grid import Grid
from qaxis.storage.lazy import LazyTensor
from qaxis.storage.side import Side, Stored

TUNING = PrefillTuning(wide_programs=4)
CONFIG = LlamaConfig(
    num_hidden_layers=1, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, attn_implementation="eager"
)


def tensors(m=1, n=150, dim=64, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    of = {"generator": g, "dtype": torch.float32, "device": "cpu"}
    return tuple(torch.randn(1, heads, rows, dim, **of).to(dtype) for heads, rows in ((2, m), (1, n), (1, n)))


# ---- settings --------------------------------------------------------------------------------------------------------


@contextmanager
def changed(get: Callable[[], object], change: Callable[..., object], value: object) -> Iterator[None]:
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


def attribute(owner: object, name: str, value: object):
    return changed(lambda: getattr(owner, name), lambda x: setattr(owner, name, x), value)


SETTINGS = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "float64 by default": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "bfloat16 by default": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "meta device by default": lambda: torch.device("meta"),
    "deterministic": lambda: changed(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "medium precision": lambda: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "bf16 by the newest API": lambda: attribute(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "tf32 by the newest API": lambda: attribute(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "tf32 by the oldest API": lambda: attribute(torch.backends.cuda.matmul, "allow_tf32", True),
}


def state() -> tuple[object, ...]:
    """Every setting that a call may not change."""
    return (
        torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.backends.mkldnn.matmul.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
    )  # fmt: skip


def everything(dtype: torch.dtype) -> list[torch.Tensor]:
    """What every public call returns."""
    q, k, v = tensors(dtype=dtype)
    out = [qaxis.canonical_scores(q, k), qaxis.unit_query(q), qaxis.attention_entropy(q, k)]
    for backend in ("reference", "triton"):
        out += qaxis.topk_attention(q, k, v, 20, backend=backend)
        out += [qaxis.topk_indices(q, k, 20, backend=backend)]
    for order in ("position", "rank"):
        out += qaxis.topk(out[0], 20, order=order)
        if emulator.available():
            out += qaxis.topk(out[0], 20, order=order, backend="cuda")
    index = index_keys(k, codes=True)
    assert index.scaled_residuals is not None
    out += [index_keys(k).norm, index.norm, index.residual, index.largest_scales, index.scaled_residuals]
    out += TritonStep(1, 2, 150, 64, 20, "cpu")(q, k, v, index)[:2]
    many, *_ = tensors(m=2, dtype=dtype)
    prefill = prefill_attention(many, k, v, qaxis.Budget(0.1), selection=True, backend="triton", tuning=TUNING)
    out += [prefill.output, selected_positions(prefill.bits)]
    for format in ("int8", "int6"):
        cache = qaxis.Int8Cache(CONFIG, format=format)
        for part in (slice(0, 3), slice(3, 140), slice(140, 150)):
            keys, values = cache.update(k[:, :, part], v[:, :, part], 0)
        out += [keys.clone(), values.clone(), *qaxis.topk_attention(q, keys, values, 20)]
    return [x.clone() for x in out]


plain: dict[torch.dtype, list[torch.Tensor]] = {}


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_of_torch_changes_a_bit_nor_is_changed(setting):
    # Autocast to the one half format is tried with the other, which some operations refuse to see beside it.
    dtype = torch.float16 if setting == "autocast to bfloat16" else torch.bfloat16
    right = plain.setdefault(dtype, everything(dtype))
    with SETTINGS[setting]():
        before = state()
        found = everything(dtype)
        assert state() == before
    assert [x.dtype for x in found] == [x.dtype for x in right]
    wrong = [i for i, (a, b) in enumerate(zip(found, right, strict=True)) if not torch.equal(a, b)]
    assert not wrong


@pytest.mark.parametrize("setting", ["autocast to bfloat16", "medium precision", "bf16 by the newest API"])
def test_scores_by_product_keep_their_bound(setting):
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 2, 600, 33, generator=g), torch.randn(1, 1, 500, 33, generator=g)
    with SETTINGS[setting]():
        fast = product_scores(q, k)
    assert fast.dtype == torch.float32
    off = (fast.double() - canonical.scores(q, k).double()).abs()
    assert bool((off <= product_error_bound(q, k).double()).all())


def test_settings_by_several_interfaces_raise_nothing():
    q, k, _ = tensors()
    right = qaxis.topk_indices(q, k, 9)
    with SETTINGS["medium precision"](), SETTINGS["bf16 by the newest API"]():
        assert torch.equal(qaxis.topk_indices(q, k, 9), right)


@pytest.mark.parametrize("first", [torch.inference_mode, nullcontext])
@pytest.mark.parametrize("moved", [False, True])
def test_a_cache_goes_on_in_and_out_of_inference_mode(first, moved):
    second = nullcontext if first is torch.inference_mode else torch.inference_mode
    _, k, v = tensors()
    # With room at once, the buffer that is made in the one mode is written to in the other.
    whole, cache = qaxis.Int8Cache(CONFIG), qaxis.Int8Cache(CONFIG, room=256)
    right = [x.clone() for x in whole.update(k, v, 0)]
    with first():
        cache.update(k[:, :, : 90 + 10 * moved], v[:, :, : 90 + 10 * moved], 0)
        if moved:
            cache.crop(-10)
            cache.reorder_cache(torch.tensor([0]))
    with second():
        found = [x.clone() for x in cache.update(k[:, :, 90:], v[:, :, 90:], 0)]
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_a_cache_keeps_no_gradients():
    _, k, v = tensors()
    cache = qaxis.Int8Cache(CONFIG)
    keys, _ = cache.update(k.requires_grad_(), v, 0)
    assert not keys.stored.newest.requires_grad and not keys.stored.first.requires_grad


def test_parts_are_joined_under_autocast_to_another_dtype():
    a, b = torch.ones(1, 2, dtype=torch.float16), torch.zeros(1, 3, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(joined([a, b], 1), torch.tensor([[1, 1, 0, 0, 0]], dtype=torch.float16))


def test_subnormal_numbers_flushed_by_the_processor_change_nothing_above_them():
    q, k, v = tensors()
    right = qaxis.topk_attention(q, k, v, 20)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        found = qaxis.topk_attention(q, k, v, 20)
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


# ---- threads ---------------------------------------------------------------------------------------------------------


def _decoded(q, k, v, dtype=torch.bfloat16):
    k = k.to(dtype)
    return Decoder(1, 2, 150, 64, 20, "cpu")(q.to(dtype), k, v.to(dtype), index_keys(k))[:2]


def _prefilled(q, k, v):
    out = prefill_attention(q, k, v, 20, selection=True, backend="triton", tuning=TUNING)
    return out.output, out.bits


DOORS = {
    "reference": lambda *qkv: qaxis.topk_attention(*qkv, 20, backend="reference"),
    "triton": lambda *qkv: qaxis.topk_attention(*qkv, 20, backend="triton"),
    "triton step": lambda q, k, v: TritonStep(1, 2, 150, 64, 20, "cpu")(q, k, v, index_keys(k))[:2],
    "decoder": _decoded,
    "prefill": _prefilled,
}


def test_threads_may_call_every_door_at_once():
    calls = [(door, seed) for seed in range(2) for door in DOORS]
    right = [DOORS[door](*tensors(seed=seed)) for door, seed in calls]
    with ThreadPoolExecutor(len(DOORS)) as pool:
        found = list(pool.map(lambda call: DOORS[call[0]](*tensors(seed=call[1])), calls))
    for call, a, b in zip(calls, found, right, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), call


@pytest.mark.skipif(not emulator.available(), reason="needs g++")
def test_threads_that_compile_the_same_text_share_it():
    text = "__global__ void once(int* x) { x[0] = 7; }"
    with ThreadPoolExecutor(3) as pool:
        kernels = list(pool.map(lambda _: emulator.compiled(text, "once", ["-DELEM=0"]), range(3)))
    for kernel in kernels:
        x = torch.zeros(1, dtype=torch.int32)
        kernel((1, 1, 1), (32, 1, 1), [x])
        assert int(x) == 7


# ---- what a cache returns --------------------------------------------------------------------------------------------


def cached(format: str = "int8", dtype: torch.dtype = torch.float32):
    q, k, v = tensors(dtype=dtype)
    keys, values = qaxis.Int8Cache(CONFIG, format=format).update(k, v, 0)
    assert isinstance(keys, LazyTensor)
    return q, keys, values


@pytest.mark.parametrize(
    ("format", "dtype"), [("int8", torch.bfloat16), ("int8", torch.float16), ("int4", torch.float32)]
)
def test_every_door_takes_what_a_cache_returns(format, dtype):
    q, keys, values = cached(format, dtype)
    k, v = keys.clone(), values.clone()
    right = qaxis.topk_attention(q, k, v, 20)
    assert torch.equal(qaxis.canonical_scores(q, keys), qaxis.canonical_scores(q, k))
    assert torch.equal(qaxis.attention_entropy(q, keys), qaxis.attention_entropy(q, k))
    for backend in ("reference", "triton"):
        assert torch.equal(qaxis.topk_indices(q, keys, 20, backend=backend), right.indices)
        assert torch.equal(qaxis.topk_attention(q, keys, values, 20, backend=backend).output, right.output)
    out = prefill_attention(q, keys, values, 20, selection=True, backend="triton", tuning=TUNING)
    assert torch.equal(selected_positions(out.bits), right.indices)
    indices = [index_keys(keys, codes=True)]
    if format == "int8" and dtype != torch.float16:
        indices.append(index_cache(keys))
        assert indices[-1].is_of(keys.stored)
    for index in indices:
        for step in (TritonStep(1, 2, 150, 64, 20, "cpu"), Decoder(1, 2, 150, 64, 20, "cpu")):
            found = step(q, keys, values, index)
            assert torch.equal(found.indices, right.indices) and torch.equal(found.output, right.output)


def test_what_a_cache_returns_cannot_be_written_to():
    _, keys, values = cached()
    before = keys.clone()

    def view_then_write():
        keys.transpose(1, 2)[:, 3].add_(1)

    def assign():
        keys[:, :, 0] = 0

    for write in (
        lambda: keys.mul_(2), lambda: keys.zero_(), assign, view_then_write, lambda: keys.view(-1).fill_(1),
        lambda: torch.add(values, 1, out=keys), lambda: keys.copy_(values),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="clone"):
            write()
    copy = torch.zeros_like(before)
    assert type(copy.copy_(keys)) is torch.Tensor and torch.equal(copy, before)
    assert torch.equal(keys.transpose(1, 2)[:, 3:5] * 1, before.transpose(1, 2)[:, 3:5])


# ---- forms -----------------------------------------------------------------------------------------------------------


class NoMemory(torch.Tensor):
    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def _fake(x: torch.Tensor) -> torch.Tensor:
    return FakeTensorMode().from_tensor(x)


STRANGE = {
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[0]]),
    "meta": lambda x: x.to("meta"),
    "negative view": lambda x: torch.complex(x, x).conj().imag,
    "fake": _fake,
    "without memory": NoMemory,
    "float64": lambda x: x.double(),
    "sparse": lambda x: x.to_sparse(),
    "no tensor": lambda x: x.tolist(),
}


def calls(q, k, v) -> Iterator[Callable[[], object]]:
    yield lambda: qaxis.unit_query(q)
    yield lambda: qaxis.canonical_scores(q, k)
    yield lambda: qaxis.topk_indices(q, k, 9)
    yield lambda: qaxis.topk_attention(q, k, v, 9)
    yield lambda: qaxis.topk_attention(q, k, v, 9, backend="triton")
    yield lambda: prefill_attention(q, k, v, 9, tuning=TUNING)
    yield lambda: index_keys(k)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STRANGE)
def test_tensors_that_no_kernel_could_read_are_refused(kind):
    good = tensors()
    index = index_keys(good[1])
    all_strange = [STRANGE[kind](x) for x in good]
    for call in calls(*all_strange):
        with pytest.raises(ValueError, match=r"^(q|k)\b.*allowed is"):
            call()
    with pytest.raises(ValueError, match=r"^scores\b.*allowed is"):
        qaxis.topk(all_strange[0], 9)
    for place in range(3):
        mixed = [*good[:place], all_strange[place], *good[place + 1 :]]
        for step in (TritonStep(1, 2, 150, 64, 9, "cpu"), Decoder(1, 2, 150, 64, 9, "cpu")):
            with pytest.raises(ValueError, match=rf"^{'qkv'[place]}\b.*allowed is"):
                step(*mixed, index)


def test_tensors_inside_a_transform_are_refused():
    q, k, _ = tensors()
    with pytest.raises(ValueError, match="memory"):
        torch.vmap(lambda x: qaxis.canonical_scores(x, k))(q[None])
    with pytest.raises(ValueError, match="memory"):
        torch.vmap(lambda x: qaxis.topk(x, 3).values)(q[0])


@pytest.mark.parametrize(
    "scale", [True, "1", 1j, torch.tensor(1.0), 2.0**-126, 2.0**128, float("inf"), float("nan"), 0, -1.0]
)
def test_scales_out_of_range_are_refused(scale):
    q, k, v = tensors()
    with pytest.raises(ValueError, match="scale=.*2\\^-125"):
        qaxis.topk_attention(q, k, v, 9, scale=scale)


@pytest.mark.parametrize("scale", [2.0**-125, 2.0**127, 1])
def test_scales_at_the_ends_give_one_set_of_bits(scale):
    q, k, v = tensors()
    a, b = (qaxis.topk_attention(q, k, v, 9, scale=scale, backend=x).output for x in ("reference", "triton"))
    assert torch.equal(a, b)


def test_flags_are_true_or_false_and_a_query_has_a_dimension():
    q, k, v = tensors()
    for name, call in (
        ("causal", lambda: qaxis.topk_indices(q, k, 9, causal=1)),
        ("causal", lambda: qaxis.topk_attention(q, k, v, 9, causal="no")),
        ("causal", lambda: prefill_attention(q, k, v, 9, causal=None)),
        ("selection", lambda: prefill_attention(q, k, v, 9, selection=1)),
        ("codes", lambda: index_keys(k, codes=1)),
        ("q.shape", lambda: qaxis.unit_query(torch.tensor(1.0))),
    ):
        with pytest.raises(ValueError, match=name):
            call()


# ---- storage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "grid",
    [Grid(), Grid(8, "token", 32), Grid(7, "channel", 128), Grid(4, "token", 32), Grid(6, "channel", 128, zero=True),
     Grid(7, "token", 32, zero=True)],
)  # fmt: skip
def test_what_is_dequantised_near_the_largest_number_is_finite(dtype, grid):
    largest = torch.finfo(dtype).max
    g = torch.Generator().manual_seed(0)
    for share in (1.0, 0.999, 0.98, 0.77):
        x = ((torch.rand(1, 1, 256, 64, generator=g) * 2 - 1) * largest * share).to(dtype)
        x[..., 5, :], x[..., 6, :], x[..., 7, ::2] = largest * share, -largest * share, 0
        side = Side(x, grid)
        if grid.bits < 6 or (grid.bits < 8 and dtype != torch.float16):
            with pytest.raises(ValueError, match="max"):
                side.prepare(x)
            continue
        side.prepare(x)()
        found = side.dequantized()
        assert bool(torch.isfinite(found).all())
        step = largest / (2**grid.bits - 2 if grid.zero else grid.limit)
        assert float((found.double() - x.double()).abs().max()) <= 4.01 * step


def _with(stored: Stored, **parts: object) -> Stored:
    return Stored(**{**vars(stored), **parts})


@pytest.mark.parametrize(
    ("part", "change"),
    [("codes", None), ("codes", "nothing"), ("scales", [1]), ("first", None), ("width", 3), ("width", True),
     ("dim", 0), ("dtype", torch.float64), ("grid", 8), ("newest", None), ("codes", "flat"), ("scales", "meta"),
     ("newest", "sparse"), ("zeros", "codes"), ("first", "negative")],
)  # fmt: skip
def test_parts_of_a_cache_that_do_not_fit_are_named(part, change):
    q, keys, values = cached()
    s = keys.stored
    made = {
        "flat": s.codes[0], "meta": s.scales.to("meta"), "sparse": s.first.to_sparse(), "codes": s.scales,
        "negative": torch.complex(s.first, s.first).conj().imag,
    }  # fmt: skip
    wrong = _with(s, **{part: made.get(change, change) if isinstance(change, str) else change})
    for call in (
        lambda: index_cache(wrong), lambda: qaxis.topk_indices(q, wrong, 9),
        lambda: Decoder(1, 2, 150, 64, 9, "cpu")(q, wrong, values, index_keys(keys)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"\.{part}|grid="):
            call()


def test_doors_that_read_tensors_alone_say_so():
    q, keys, values = cached()
    for call in (
        lambda: qaxis.canonical_scores(q, keys.stored), lambda: index_keys(keys.stored),
        lambda: qaxis.attention_entropy(q, keys.stored), lambda: prefill_attention(q, keys.stored, values, 9),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="^k='Stored'"):
            call()

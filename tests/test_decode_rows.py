"""Rows that see some of the keys and keep as many as they say: CUDA C++, emulated, has the bits of the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from qaxis import decode
from qaxis.attention import backend
from qaxis.attention.always import NONE, Always
from qaxis.attention.logits import Logits
from qaxis.cuda import emulator
from qaxis.decode import api, cuda
from qaxis.decode.triton_step import Step
from qaxis.storage.grid import Grid
from qaxis.storage.side import Side, Stored

pytestmark = pytest.mark.skipif(not emulator.available(), reason="g++ is needed to emulate CUDA")

#: (begin, end, k_eff) of each batch row
Rows = Sequence[tuple[int, int, int]]


def bell(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def device_rows(rows: Rows) -> torch.Tensor:
    return torch.tensor([[*row, -1] for row in rows], dtype=torch.int32)


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows, most: int, always: Always, logits: Logits
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and indices of the reference."""
    place = torch.arange(k.shape[2])
    begin, end, k_eff = (torch.tensor(x)[:, None, None] for x in zip(*rows, strict=True))
    allowed = (place >= begin[..., None]) & (place < end[..., None])
    indices = backend.select(q, k, allowed, k_eff, backend="reference", always=always)
    indices = torch.nn.functional.pad(indices, (0, most - indices.shape[-1]), value=-1)
    return backend.attend(q, k, v, indices, logits, backend="reference"), indices


def poisoned(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """NaN where no row may look."""
    x = x.clone()
    for b, (begin, end, _) in enumerate(rows):
        x[b, :, :begin], x[b, :, end:] = torch.nan, torch.nan
    return x


def stored(x: torch.Tensor, sinks: int = 4) -> Stored:
    side = Side(x, Grid(), sinks, room=x.shape[2])
    side.prepare(x)()
    return side.stored()


def check(
    decoder: decode.Decoder, q: torch.Tensor, k: Any, v: Any, index: decode.KeyIndex, rows: Rows,
    always: Always = NONE, logits: Logits | None = None,
) -> Step:  # fmt: skip
    """A step over what ``rows`` see has the reference's indices and bits, and is CUDA's."""
    whole = [x.dequantized() if isinstance(x, Stored) else x for x in (k, v)]
    if not isinstance(k, Stored):
        k, v = poisoned(k, rows), poisoned(v, rows)
    assert decoder.engine(q, k, v, index, always, logits) == ("cuda", "")
    # Sinks of float64 are a cache's own business.
    given = logits or Logits(q.shape[3] ** -0.5)
    public = given.sink is None or given.sink.dtype != torch.float64
    step = (
        decoder(q, k, v, index, rows=device_rows(rows), always=always, logits=logits)
        if public
        else decoder.run(q, k, v, index, device_rows(rows), given, always)
    )
    most = decoder.made_for.k_eff
    output, indices = expected(q, *whole, rows, most, always, given)
    assert torch.equal(step.indices, indices)
    assert torch.equal(step.output, output)
    return step


WINDOWS: list[tuple[str, Rows]] = [
    ("all", [(0, 700, 90), (0, 700, 90)]),
    ("padded", [(0, 700, 90), (333, 700, 41)]),
    ("windows", [(517, 645, 64), (511, 513, 2)]),
    ("short rows", [(0, 130, 90), (3, 4, 1)]),
    ("everything", [(100, 190, 90), (600, 690, 90)]),
    ("nothing", [(0, 700, 0), (40, 40, 0)]),
    ("last block", [(699, 700, 1), (600, 700, 7)]),
]


@pytest.fixture(scope="module")
def tensors() -> tuple[torch.Tensor, ...]:
    return tuple(bell(2, h, n, 64, seed=n + h, dtype=torch.bfloat16) for h, n in ((4, 1), (2, 700), (2, 700)))


@pytest.fixture(scope="module")
def decoder() -> decode.Decoder:
    """One for all rows: what a longer step has left behind must not matter to a shorter one."""
    return decode.Decoder(2, 4, 700, 64, 90, "cpu")


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(("name", "rows"), WINDOWS, ids=[name for name, _ in WINDOWS])
def test_rows_see_what_they_say(decoder, tensors, name, rows, codes):
    q, k, v = tensors
    check(decoder, q, k, v, decode.index_keys(k, codes=codes), rows)


ALWAYS: list[tuple[str, Always, Rows]] = [
    ("both", Always(4, 20), [(0, 700, 90), (600, 700, 30)]),
    ("nothing else", Always(3, 5), [(0, 700, 8), (100, 110, 8)]),
    ("overlapping", Always(30, 40), [(0, 60, 60), (513, 514, 1)]),
    ("sinks", Always(4, 0), [(510, 700, 5), (0, 3, 3)]),
    ("recent", Always(0, 80), [(0, 700, 90), (7, 600, 81)]),
]


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(("name", "always", "rows"), ALWAYS, ids=[name for name, _, _ in ALWAYS])
def test_what_is_always_kept_counts(decoder, tensors, name, always, rows, codes):
    q, k, v = tensors
    check(decoder, q, k, v, decode.index_keys(k, codes=codes), rows, always)


def test_the_highest_score_is_one_of_a_key_that_is_kept():
    # None of 120 keys has a code, so all are looked at; float32 shows which of them the weights are relative to.
    q, k, v = (bell(1, h, n, 64, seed=h + n) * 3 for h, n in ((2, 1), (1, 120), (1, 120)))
    decoder = decode.Decoder(1, 2, 120, 64, 8, "cpu")
    check(decoder, q, k, v, decode.index_keys(k, codes=True), [(0, 120, 8)], Always(3, 5))


LOGITS: dict[str, Logits] = {
    "cap": Logits(0.125, 5.0),
    "little cap": Logits(1.0, 0.5),
    "sink": Logits(0.125, None, bell(4, seed=3) * 4),
    "both": Logits(0.3, 30.0, bell(8, seed=4)[::2].half()),
    "bfloat16": Logits(0.125, None, bell(4).bfloat16()),
    "float64": Logits(0.125, None, bell(1).double().expand(4)),
    "no numbers": Logits(0.125, None, torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])),
}


@pytest.mark.parametrize("name", LOGITS)
def test_soft_caps_and_sinks_have_the_bits_of_the_reference(decoder, tensors, name):
    q, k, v = tensors
    check(decoder, q, k, v, decode.index_keys(k), [(0, 700, 90), (300, 301, 1)], logits=LOGITS[name])


# ---- other shapes and formats ----------------------------------------------------------------------------------------

#: multiprocessors, heads, KV heads, head_dim, dtype: programs of a row are 1, 2 and 8
SHAPES = [
    (2, 8, 1, 256, torch.float16), (4, 3, 1, 64, torch.float32), (132, 2, 2, 128, torch.bfloat16),
    (4, 7, 1, 128, torch.float16), (2, 5, 1, 32, torch.float32),
]  # fmt: skip


@pytest.mark.parametrize(("multiprocessors", "heads", "kv_heads", "dim", "dtype"), SHAPES)
def test_rows_of_any_shape(monkeypatch, multiprocessors, heads, kv_heads, dim, dtype):
    monkeypatch.setattr(cuda, "EMULATED_MULTIPROCESSORS", multiprocessors * heads)
    q, k, v = (bell(1, h, n, dim, seed=h + n, dtype=dtype) for h, n in ((heads, 1), (kv_heads, 1100), (kv_heads, 1100)))
    decoder, index = decode.Decoder(1, heads, 1100, dim, 600, "cpu"), decode.index_keys(k)
    for row in [(0, 1100, 600), (530, 1061, 270), (1025, 1090, 7)]:
        check(decoder, q, k, v, index, [row])
    (made,) = decoder.steps.values()
    assert made is not None and made.plan.cluster == min(8, 1 << (multiprocessors.bit_length() - 1))


@pytest.mark.parametrize("sinks", [0, 4])
def test_rows_of_an_8_bit_cache(sinks):
    q, k, v = (bell(2, h, n, 128, seed=h + n, dtype=torch.bfloat16) for h, n in ((2, 1), (1, 900), (1, 900)))
    decoder = decode.Decoder(2, 2, 900, 128, 120, "cpu")
    for n in (900, 515, 127):
        keys, values = stored(k[:, :, :n], sinks), stored(v[:, :, :n], sinks)
        most = min(n, 120)
        for rows in ([(0, n, most), (n // 2 + 1, n, 1)], [(2, n, most // 2), (n - 1, n, 1)]):
            check(decoder, q, keys, values, decode.index_cache(keys), rows)
    keys, values = stored(k, sinks), stored(v, sinks)
    check(decoder, q, keys, values, decode.index_cache(keys), [(1, 900, 90), (890, 900, 9)], Always(5, 4))


@pytest.mark.parametrize("always", [NONE, Always(2, 300)], ids=["plain", "always"])
@pytest.mark.parametrize("codes", [False, True])
def test_rows_that_see_little_of_the_room(codes, always):
    # Far fewer keys than there is room for, hardly more than are kept, one.
    q, k, v = (bell(1, h, n, 64, seed=h + n, dtype=torch.bfloat16) for h, n in ((2, 1), (1, 9000), (1, 9000)))
    decoder, index = decode.Decoder(1, 2, 9000, 64, 520, "cpu"), decode.index_keys(k, codes=codes)
    for row in [(0, 9000, 520), (3300, 4800, 520), (0, 521, 520), (8999, 9000, 1), (100, 3000, 303)]:
        fewer = always if row[2] > sum(always) else NONE
        step = check(decoder, q, k, v, index, [row], fewer)
        made = decoder.cuda_step(q, k, v, index, fewer)
        assert made is not None
        # Keys are told apart by their own scores then: of all there are hardly more candidates than are kept.
        assert codes or row[1] - row[0] > 1500 or int(step.rescored.sum(-1).max()) <= 1.2 * row[2]


@pytest.mark.parametrize("always", [NONE, Always(3, 50), Always(0, 300)], ids=["plain", "always", "only those"])
@pytest.mark.parametrize("codes", [False, True])
def test_ties_beyond_any_room(codes, always):
    q, k, v = (bell(1, h, n, 64, seed=h + n, dtype=torch.bfloat16) for h, n in ((1, 1), (1, 1), (1, 12000)))
    # One key for all, but for a better one in every 2000.
    k = k.expand(1, 1, 12000, 64).clone()
    k[:, :, 1999::2000] = q
    decoder, index = decode.Decoder(1, 1, 12000, 64, 300, "cpu"), decode.index_keys(k, codes=codes)
    step = check(decoder, q, k, v, index, [(1700, 11000, 300)], always)
    made = decoder.cuda_step(q, k, v, index, always)
    assert made is not None
    assert sum(always) == 300 or int(step.rescored.max()) > made.plan.room


# ---- what a cache relies on ------------------------------------------------------------------------------------------


def recorded(step: cuda.CudaStep) -> list[Any]:
    """From now on: grids and arguments of what the step launches, tensors by their place; results are new each time."""
    launched: list[Any] = []

    def around(kernel: Any, results: tuple[int, ...]) -> Any:
        def call(grid: Any, block: Any, args: list[Any], shared_mem: int = 0) -> None:
            places = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]
            launched.append((grid, block, [x for i, x in enumerate(places) if i not in results], shared_mem))
            kernel(grid, block, args, shared_mem)

        return call

    step.score_kernel, step.choose_kernel = around(step.score_kernel, ()), around(step.choose_kernel, (40, 41))
    return launched


def cut(whole: Stored, x: torch.Tensor, n: int) -> Stored:
    """The first ``n`` tokens, each part a view of its buffer, as a cache that grows in place has them."""
    groups = n // 128
    assert whole.newest is not None
    whole.newest[:, :, : n % 128] = x[:, :, groups * 128 : n]
    codes, scales, newest = (
        whole.codes[:, :, : groups * 128],
        whole.scales[:, :, :groups],
        whole.newest[:, :, : n % 128],
    )
    return dataclasses.replace(whole, codes=codes, scales=scales, newest=newest)


@pytest.mark.parametrize("form", ["keys", "codes", "cache"])
def test_what_is_launched_does_not_depend_on_how_many_tokens_there_are(form):
    q, k, v = (bell(1, h, n, 64, seed=h + n, dtype=torch.bfloat16) for h, n in ((2, 1), (1, 511), (1, 511)))
    decoder, rows, logits = decode.Decoder(1, 2, 511, 64, 30, "cpu"), device_rows([(0, 0, 0)]), Logits(0.125)
    keys, values = stored(k, 0), stored(v, 0)
    index = {
        "keys": decode.index_keys(k),
        "codes": decode.index_keys(k, codes=True),
        "cache": decode.index_cache(keys),
    }[form]
    launched: list[Any] = []
    for n in (1, 127, 128, 130, 511):
        codes = None if index.codes is None else cut(keys if form == "cache" else index.codes, k, n)
        scaled = index.scaled_residuals
        scaled = None if scaled is None else scaled[:, :, : n // 128]
        now = decode.KeyIndex(index.norm, index.residual, index.largest_scales, codes, scaled)
        given = (codes, cut(values, v, n)) if form == "cache" else (k[:, :, :n], v[:, :, :n])
        assert decoder.engine(q, *given, now) == ("cuda", "")
        (made,) = decoder.steps.values()
        assert made is not None
        launched = launched or recorded(made)
        rows.copy_(device_rows([(0, n, min(n, 30))]))
        step = decoder.run(q, *given, now, rows, logits)
        whole = [x.dequantized() if isinstance(x, Stored) else x for x in given]
        output, indices = expected(q, *whole, [(0, n, min(n, 30))], 30, NONE, logits)
        assert torch.equal(step.indices, indices) and torch.equal(step.output, output)
        assert launched[-2:] == launched[:2]
    sizes = len(decoder.laid_out), len(decoder.checked)
    for n in range(200, 230):
        decoder.engine(q, k[:, :, :n], v[:, :, :n], decode.index_keys(k[:, :, :n]))
    assert (len(decoder.laid_out), len(decoder.checked)) <= (sizes[0] + 1, sizes[1])


def test_the_engine_is_named_with_what_keeps_the_faster_one_away():
    def engine(k: torch.Tensor, heads: int = 2, k_eff: int = 9, **index: Any) -> tuple[str, str]:
        decoder = decode.Decoder(1, heads, k.shape[2], k.shape[3], k_eff, "cpu")
        return decoder.engine(bell(1, heads, 1, k.shape[3], dtype=k.dtype), k, k, decode.index_keys(k, **index))

    half = bell(1, 1, 200, 256, dtype=torch.float16)
    assert engine(half) == engine(half, codes=True) == ("cuda", "")
    short = half[..., :32].contiguous()
    assert engine(short, codes=True) == ("triton", "codes of head_dim 32, not 64, 128, 256")
    assert engine(half, heads=9) == ("triton", "9 query heads share a key head, more than 8")
    assert "no power of two" in engine(bell(1, 1, 200, 48))[1]
    # Pages that nobody touches take no memory.
    assert "shared memory" in engine(torch.empty(1, 1, 1, 16).expand(1, 1, 400000, 16), k_eff=200000)[1]


def test_no_engine_is_named_where_no_step_runs(monkeypatch):
    def nowhere(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("Triton was loaded too early")

    decoder, half = decode.Decoder(1, 9, 40, 64, 9, "cpu"), bell(1, 1, 40, 64, dtype=torch.float16)
    monkeypatch.setattr(api, "check_device", nowhere)
    with pytest.raises(RuntimeError, match="9 query heads share .*; Triton was loaded too early"):
        decoder.engine(bell(1, 9, 1, 64, dtype=torch.float16), half, half, decode.index_keys(half))


def test_rows_never_lead_beyond_the_room(decoder, tensors):
    q, k, v = tensors
    rows = torch.tensor([[-5, 1 << 30, 1 << 30, 0], [600, 20, -3, 0]], dtype=torch.int32)
    step = decoder(q, k, v, decode.index_keys(k), rows=rows)
    output, indices = expected(q, k, v, [(0, 700, 90), (0, 0, 0)], 90, NONE, Logits(0.125))
    assert torch.equal(step.indices, indices) and torch.equal(step.output, output)

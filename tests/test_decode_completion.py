"""The CUDA C++ step with completion, emulated: bits of ``topk_attention`` over bounds, of ``places.py`` over codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import qaxis
from qaxis import decode
from qaxis.arithmetic import reference as canonical
from qaxis.attention import backend, completion
from qaxis.attention.always import NONE, Always
from qaxis.attention.completion import Seen
from qaxis.attention.logits import Logits
from qaxis.cuda import compiler, emulator
from qaxis.decode import cuda, places
from qaxis.storage.grid import Grid
from qaxis.storage.moments import GROUP, Moments, add_groups, empty
from qaxis.storage.side import Side, Stored

pytestmark = pytest.mark.skipif(not emulator.available(), reason="g++ is needed to emulate CUDA")

#: (begin, end, k_eff) of each batch row
Rows = Sequence[tuple[int, int, int]]


def bell(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def three(heads: int, kv_heads: int, n: int, dim: int, dtype: torch.dtype = torch.float32, batch: int = 1) -> Any:
    """Query, keys and values, these not about 0, so that a mean and a slope matter."""
    q = bell(batch, heads, 1, dim, seed=heads)
    k, v = (bell(batch, kv_heads, n, dim, seed=n + s) for s in (1, 2))
    v = v + 0.3 * k.flip(-1) + torch.linspace(-1, 1, dim)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def stored(x: torch.Tensor, sinks: int = 4) -> Stored:
    side = Side(x, Grid(), sinks, room=x.shape[2])
    side.prepare(x)()
    return side.stored()


def full(x: Any) -> torch.Tensor:
    return x.dequantized() if isinstance(x, Stored) else x


def moments_of(k: torch.Tensor, v: torch.Tensor, rows: Rows) -> Moments:
    """Of the complete groups that each row sees."""
    each = [
        add_groups(empty(k[b], v[b]), k[b], v[b], -(-begin // GROUP), end // GROUP)
        for b, (begin, end, _) in enumerate(rows)
    ]
    return Moments(*(torch.stack(parts) for parts in zip(*each, strict=True)))


def poisoned(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """NaN where no row may look."""
    x = x.clone()
    for b, (begin, end, _) in enumerate(rows):
        x[b, :, :begin], x[b, :, end:] = torch.nan, torch.nan
    return x


def check(
    decoder: decode.Decoder, q: torch.Tensor, k: Any, v: Any, index: decode.KeyIndex, rows: Rows,
    always: Always = NONE, logits: Logits | None = None, kind: str = "linear",
) -> cuda.CudaStep:  # fmt: skip
    """A completed step over what ``rows`` see has the right indices, lines and bits."""
    keys, values, most = full(k), full(v), decoder.made_for.k_eff
    place, given = torch.arange(keys.shape[2]), logits or Logits(q.shape[3] ** -0.5)
    begin, end, k_eff = (torch.tensor(x)[:, None, None] for x in zip(*rows, strict=True))
    allowed = (place >= begin[..., None]) & (place < end[..., None])
    indices = backend.select(q, keys, allowed, k_eff, backend="reference", always=always)
    indices = torch.nn.functional.pad(indices, (0, most - indices.shape[-1]), value=-1)
    moments, device_rows = moments_of(keys, values, rows), torch.tensor([[*r, -1] for r in rows], dtype=torch.int32)
    if not isinstance(k, Stored):
        k, v = poisoned(k, rows), poisoned(v, rows)
    assert decoder.engine(q, k, v, index, always, logits, kind) == ("cuda", "")
    variant = cuda.variant_of(always, logits, kind)
    made = decoder.steps[cuda.shape_of(q, k, v, index, decoder.made_for.n, most, variant)]
    assert made is not None and made.shape.completed
    made.buffers.line.fill_(torch.nan)
    step = decoder(
        q, k, v, index, rows=device_rows, always=always, logits=logits, completion=kind, moments=moments
    )  # fmt: skip
    assert torch.equal(step.indices, indices)
    assert not made.buffers.tally.any()
    check_lines(made.buffers.line, q, moments, rows, kind)
    if index.codes is None:
        seen = Seen(begin, end)
        expected = backend.attend(
            q, keys, values, indices, given, backend="reference", completion=kind, seen=seen
        )  # fmt: skip
    else:
        expected = places.attend(
            q, keys, values, indices, device_rows, made.buffers.fast, made.buffers.units, given, kind,
            index.codes.first.shape[2], always,
        )  # fmt: skip
    assert torch.equal(step.output, expected)
    return made


def check_lines(line: torch.Tensor, q: torch.Tensor, moments: Moments, rows: Rows, kind: str) -> None:
    """What the score kernels leave of every fit has the bits of the reference."""
    heads, dim_v = q.shape[1], moments.products.shape[2] - q.shape[3]
    group = heads // moments.products.shape[1]
    for b, (begin, end, _) in enumerate(rows):
        count = max(0, end // GROUP - -(-begin // GROUP)) * GROUP
        for h in range(heads):
            found, g = line[b * heads + h], h // group
            if count == 0:
                assert not found.any()
                continue
            own = Moments(moments.products[b, g], moments.sums[b, g])
            right = completion.along(q[b, h].float(), own, count)
            if kind == "mean":
                right = right._replace(second=torch.zeros(1), cross=torch.zeros(1, dim_v))
            parts = (found[:1], right.total), (found[1:2], right.second), (found[4 : 4 + dim_v], right.values)
            sizes = right.values.abs().max(), right.cross.abs().max()
            assert all(torch.equal(x, y) or x.isnan() for x, y in zip(found[2:4], sizes, strict=True))
            assert all(torch.equal(x, y) for x, y in (*parts, (found[4 + dim_v :], right.cross[0])))


# ---- scores that are canonical ---------------------------------------------------------------------------------------

ROWS: list[tuple[str, Rows]] = [
    ("all", [(0, 1100, 90), (0, 1100, 1)]),
    ("odd places", [(3, 1043, 90), (257, 1099, 41)]),
    ("about a run", [(0, 143, 9), (0, 145, 7)]),
    ("about a group", [(0, 128, 8), (1, 256, 3)]),
    ("about a block", [(0, 511, 90), (0, 513, 60)]),
    ("from a later block", [(512, 1024, 33), (640, 897, 5)]),
    ("no complete group", [(0, 127, 9), (129, 383, 20)]),
    ("all are kept", [(100, 300, 200), (0, 160, 160)]),
    ("nothing", [(0, 1100, 0), (300, 300, 0)]),
]


@pytest.fixture(scope="module")
def tensors() -> Any:
    return three(6, 2, 1100, 64, batch=2)


@pytest.fixture(scope="module")
def decoder() -> decode.Decoder:
    """One for all rows: what a longer step has left behind must not matter to a shorter one."""
    return decode.Decoder(2, 6, 1100, 64, 200, "cpu")


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(("name", "rows"), ROWS, ids=[name for name, _ in ROWS])
def test_rows_are_completed(decoder, tensors, name, rows, codes):
    q, k, v = tensors
    check(decoder, q, k, v, decode.index_keys(k, codes=codes), rows, kind="mean" if name == "odd places" else "linear")


@pytest.mark.parametrize("codes", [False, True])
def test_runs_are_summed_whatever_becomes_of_scores(tensors, codes):
    q, k, v = tensors
    decoder, index = decode.Decoder(2, 6, 1100, 64, 200, "cpu"), decode.index_keys(k, codes=codes)
    rows = [(0, 1100, 9), (257, 1099, 1)]
    for logits in (None, Logits(0.125, None, bell(6, seed=3) * 4), Logits(40.0)):
        check(decoder, q, k, v, index, rows, logits=logits)
    check(decoder, q, k, v, index, [(3, 1043, 90), (512, 1024, 33)], Always(4, 20))


@pytest.mark.parametrize(
    ("heads", "dim", "dtype"), [(1, 16, torch.float32), (8, 128, torch.bfloat16), (3, 256, torch.half)]
)
def test_runs_of_any_shape_are_summed_where_keys_are_scored(heads, dim, dtype):
    # Two or more keys, or a part of one, are a lane's.
    q, k, v = three(heads, 1, 700, dim, dtype)
    for codes in (False, True) if dim > 16 else (False,):
        check(decode.Decoder(1, heads, 700, dim, 60, "cpu"), q, k, v, decode.index_keys(k, codes=codes), [(5, 690, 9)])


@pytest.mark.parametrize("kind", ["mean", "linear"])
@pytest.mark.parametrize(("key", "number"), [(1e18, 1e20), (1e18, 3e36), (1.0, 3e36)])
def test_moments_that_leave_float32(kind, key, number):
    """What of them cannot be put back is not: a slope, or anything."""
    q, k, v = three(2, 1, 300, 64, torch.float32)
    q, k, v = q / key, k * key, v.abs() * number
    decoder, index = decode.Decoder(1, 2, 300, 64, 30, "cpu"), decode.index_keys(k)
    step = decoder(q, k, v, index, completion=kind, moments=moments_of(k, v, [(0, 300, 30)]))
    right = qaxis.topk_attention(q, k, v, 30, completion=kind)
    assert torch.equal(step.output, right.output) and right.output.isfinite().all()
    assert (right.output > 0.1 * number).all()


@pytest.mark.parametrize("kind", ["mean", "linear", "block"])
def test_it_is_what_topk_attention_gives(kind):
    # 300 keys: two complete groups, and some more that are left too.
    q, k, v = three(2, 1, 300, 64)
    decoder, index = decode.Decoder(1, 2, 300, 64, 30, "cpu"), decode.index_keys(k)
    step = decoder(q, k, v, index, completion=kind, moments=moments_of(k, v, [(0, 300, 30)]))
    right, without = (qaxis.topk_attention(q, k, v, 30, completion=x) for x in (kind, "none"))
    assert torch.equal(step.indices, right.indices) and torch.equal(step.output, right.output)
    assert not torch.equal(right.output, without.output)
    # The same decoder still gives what it gave.
    assert torch.equal(decoder(q, k, v, index).output, without.output)


#: multiprocessors a head, heads, KV heads, head_dim, dim of values, dtype, codes
SHAPES = [
    (1, 1, 1, 128, 128, torch.bfloat16, False), (2, 4, 1, 256, 256, torch.float16, False),
    (8, 3, 1, 128, 64, torch.float32, False), (4, 2, 2, 16, 32, torch.float32, False),
    (1, 2, 1, 128, 64, torch.float32, True), (4, 8, 1, 64, 256, torch.float16, True),
    (2, 4, 1, 256, 128, torch.bfloat16, True),
]  # fmt: skip


@pytest.mark.parametrize(("multiprocessors", "heads", "kv_heads", "dim", "dim_v", "dtype", "codes"), SHAPES)
def test_rows_of_any_shape(monkeypatch, multiprocessors, heads, kv_heads, dim, dim_v, dtype, codes):
    monkeypatch.setattr(cuda, "EMULATED_MULTIPROCESSORS", multiprocessors * heads)
    q, k, _ = three(heads, kv_heads, 2100, dim, dtype)
    v = bell(1, kv_heads, 2100, dim_v, seed=7, dtype=dtype)
    decoder, index = decode.Decoder(1, heads, 2100, dim, 200, "cpu"), decode.index_keys(k, codes=codes)
    made = check(decoder, q, k, v, index, [(517, 2069, 200)])
    assert made.plan.cluster == min(8, 1 << (multiprocessors.bit_length() - 1))


def test_blocks_are_added_by_their_absolute_number():
    # The 1024th block is among them, then the 32nd: trees have a level more, and begin far before the row.
    n = 526000
    q, k, v = three(4, 1, n, 16)
    decoder, index = decode.Decoder(1, 4, n, 16, 40, "cpu"), decode.index_keys(k)
    for row in [(522700, 525500, 40), (16100, 17000, 9), (511 * 512 + 3, 511 * 512 + 500, 9)]:
        # Weights that are much alike: what is left decides about the output, and its last bit.
        check(decoder, q, k, v, index, [row], logits=Logits(0.05))


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(
    ("always", "rows"),
    [(Always(4, 20), [(0, 1100, 90), (515, 1041, 30)]), (Always(70, 3), [(200, 1100, 100), (0, 600, 74)])],
)
def test_what_is_always_kept_is_not_left(decoder, tensors, always, rows, codes):
    q, k, v = tensors
    check(decoder, q, k, v, decode.index_keys(k, codes=codes), rows, always)


LOGITS: dict[str, Logits] = {
    "sink": Logits(0.125, None, bell(6, seed=3) * 4),
    "high sink": Logits(0.125, None, torch.full((6,), 9.0)),
    "no numbers": Logits(0.125, None, torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 0.0])),
    "cap": Logits(0.3, 5.0),
    "both": Logits(1.0, 0.5, bell(6, seed=4).half()),
}


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("name", LOGITS)
def test_soft_caps_and_sinks(decoder, tensors, name, codes):
    q, k, v = tensors
    index = decode.index_keys(k, codes=codes)
    check(decoder, q, k, v, index, [(5, 1100, 90), (300, 901, 1)], logits=LOGITS[name])


@pytest.mark.parametrize("scale", [2.0**-110, 1e-3, 3.0, 40.0, 2.0**100])
def test_weights_from_all_alike_to_none(decoder, tensors, scale):
    # By the last ones most weights are below the normal numbers, or 0.
    q, k, v = tensors
    for codes in (False, True):
        index = decode.index_keys(k, codes=codes)
        check(decoder, q, k, v, index, [(0, 1100, 20), (9, 700, 20)], logits=Logits(scale))


def test_scores_that_hardly_differ_have_no_slope():
    # What the keys share is far larger than what they differ in; of the second head it is not.
    q, k, v = three(2, 2, 700, 64)
    k[:, 0] = 100 + k[:, 0] / 100
    q[:, 0] = q[:, 0].abs()
    decoder, index = decode.Decoder(1, 2, 700, 64, 60, "cpu"), decode.index_keys(k)
    for kind in ("linear", "mean"):
        check(decoder, q, k, v, index, [(0, 700, 60)], kind=kind)
    linear, mean = (qaxis.topk_attention(q, k, v, 60, completion=kind).output for kind in ("linear", "mean"))
    assert (linear == mean).flatten(2).all(2)[0].tolist() == [True, False]


def test_powers_of_two_at_most_one_have_the_canonical_bits():
    source = """
    extern "C" __global__ void powers(const float* x, float* y, float* z, int n, double factor) {
        for (int i = threadIdx.x; i < n; i += 32) {
            y[i] = power_below(x[i], (float)factor * (-1.0f / 256.0f));
            z[i] = exp2_canonical(__fmul_rn(x[i], (float)factor));
        }
    }
    """
    text = cuda.RUN_PART.read_text("utf-8")
    begin, end = text.index("constexpr float UP"), text.index("// (place - 32767.5) unit")
    rules = compiler.CANONICAL.read_text("utf-8")
    options = compiler.defines(elem=0, dim=16, completed=1)
    kernel = emulator.compiled(rules + text[begin:end] + source, "powers", options)
    x = -torch.cat([
        torch.rand(20000, generator=torch.Generator().manual_seed(1)) * 300, torch.arange(0, 300, 0.125),
        torch.tensor([0.0, 1e-45, 1e-38, 1e-30, 1e-7, 149.0, 149.5, 150.0, 199.9, 252.4, 253.0, 255.5, 256.0, 1e30]),
        torch.linspace(125.5, 150.5, 5000),
    ])  # fmt: skip
    for factor in (1.0, 0.18033688, 37.1):
        y, z = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
        kernel((1, 1, 1), (32, 1, 1), [x, y, z, len(x), factor])
        assert torch.equal(y, z)
        assert torch.equal(y, canonical.exp2(x * torch.tensor(factor)))


# ---- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("always", [NONE, Always(5, 4)], ids=["plain", "always"])
def test_rows_of_an_8_bit_cache(always):
    q, k, v = three(4, 1, 1000, 128, torch.bfloat16)
    decoder = decode.Decoder(1, 4, 1000, 128, 120, "cpu")
    for n, begin in ((1000, 0), (1000, 1), (515, 130), (127, 0)):
        keys, values = stored(k[:, :, :n]), stored(v[:, :, :n])
        check(decoder, q, keys, values, decode.index_cache(keys), [(begin, n, 60)], always)


def test_places_are_near_to_the_canonical_scores():
    # float32, so that what places are off by is seen.
    q, k, v = three(4, 2, 1100, 64)
    decoder = decode.Decoder(1, 4, 1100, 64, 60, "cpu")
    given = moments_of(k, v, [(0, 1100, 60)])
    by_codes, by_bounds = (
        decoder(q, k, v, decode.index_keys(k, codes=codes), completion="linear", moments=given).output
        for codes in (True, False)
    )
    off = (by_codes - by_bounds).abs().max()
    assert 0 < off < 1e-3


def test_a_row_without_units_has_canonical_scores():
    # The first query is so short that its scores have no places; the second is 0.
    q, k, v = three(3, 1, 700, 64)
    q = q * torch.tensor([1e-30, 0.0, 1.0])[:, None, None]
    decoder, index = decode.Decoder(1, 3, 700, 64, 50, "cpu"), decode.index_keys(k, codes=True)
    rows = torch.tensor([[3, 690, 50, 0]], dtype=torch.int32)
    moments = moments_of(k, v, [(3, 690, 50)])
    for scale in (0.125, 1e30):
        step = decoder(q, k, v, index, scale, rows=rows, completion="linear", moments=moments)
        made = decoder.cuda_step(q, k, v, index, completion="linear")
        assert made is not None and made.buffers.units.tolist()[:2] == [0, 0]
        work = made.buffers
        right = places.attend(q, k, v, step.indices, rows, work.fast, work.units, Logits(scale), "linear")
        exact = decoder(q, k, v, decode.index_keys(k), scale, rows=rows, completion="linear", moments=moments)
        assert torch.equal(step.output, right)
        assert torch.equal(step.output[:, :2], exact.output[:, :2]) and torch.equal(step.indices, exact.indices)


@pytest.mark.parametrize("codes", [False, True])
def test_ties_beyond_any_room(codes):
    # The slower way to choose: all keys are alike but for a better one in every 2000.
    q, k, v = three(1, 1, 12000, 64)
    k = k[:, :, :1].expand(1, 1, 12000, 64).clone()
    k[:, :, 1999::2000] = q / 2
    decoder, index = decode.Decoder(1, 1, 12000, 64, 300, "cpu"), decode.index_keys(k, codes=codes)
    made = check(decoder, q, k, v, index, [(1700, 11000, 300)], logits=Logits(0.01))
    assert int(made.count.max()) > made.plan.room


# ---- what is asked ---------------------------------------------------------------------------------------------------


def test_what_is_not_allowed_is_named():
    q, k, v = three(2, 1, 300, 64)
    decoder, index = decode.Decoder(1, 2, 300, 64, 30, "cpu"), decode.index_keys(k)
    moments = moments_of(k, v, [(0, 300, 30)])
    products, sums = moments
    across = products.mT.contiguous().mT
    for message, given in [
        (r"^completion='all'", {"completion": "all", "moments": moments}),
        (r"^moments='NoneType'", {"completion": "mean"}),
        (r"^moments='Moments'", {"moments": moments}),
        (r"^moments\.products\.shape", {"completion": "mean", "moments": Moments(products[:, :, 1:], sums)}),
        (r"^moments\.sums\.shape", {"completion": "mean", "moments": Moments(products, sums[0])}),
        (r"^moments\.sums\.dtype", {"completion": "mean", "moments": Moments(products, sums.double())}),
        (r"^moments\.products\.device", {"completion": "mean", "moments": Moments(products.to("meta"), sums)}),
        (r"^moments\.products\.stride", {"completion": "mean", "moments": Moments(across, sums)}),
        (r"^always=", {"completion": "mean", "moments": moments, "always": Always(10, 20)}),
        (r"^logits\.scale", {"completion": "mean", "moments": moments, "scale": 2.0**-111}),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            decoder(q, k, v, index, **given)
    decoder(q, k, v, index, completion="mean", moments=moments, always=Always(10, 19))


def test_triton_refuses_by_name():
    # A head_dim that CUDA C++ does not read.
    q, k, v = three(2, 1, 300, 48)
    decoder, index = decode.Decoder(1, 2, 300, 48, 30, "cpu"), decode.index_keys(k)
    assert decoder.engine(q, k, v, index)[0] == "triton"
    with pytest.raises(RuntimeError, match=r"head_dim is no power of two.*Triton's has no completion"):
        decoder.engine(q, k, v, index, completion="block")
    with pytest.raises(ValueError, match=r"^completion='mean'.*head_dim is no power of two"):
        decoder(q, k, v, index, completion="mean", moments=moments_of(k, v, [(0, 300, 30)]))
    assert decoder.cuda_step(q, k, v, index, completion="mean") is None


def test_a_completed_step_is_a_step_of_its_own():
    q, k, v = three(2, 1, 300, 64)
    decoder, index = decode.Decoder(1, 2, 300, 64, 30, "cpu"), decode.index_keys(k)
    plain, completed = (decoder.cuda_step(q, k, v, index, completion=x) for x in ("none", "linear"))
    assert plain is not None and completed is not None and plain is not completed
    assert dataclasses.replace(plain.shape, completed=True) == completed.shape
    assert decoder.cuda_step(q, k, v, index, completion="mean") is completed

"""A decode step outside its claim: ties, refusals, any layout in memory, one decoder for many steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

import qaxis
from qaxis import canonical_scores
from qaxis.arithmetic import fast_scores as bounds
from qaxis.decode import Decoder, KeyIndex, index_cache, index_keys
from qaxis.decode.triton_step import TritonStep, Tuning
from qaxis.storage.grid import Grid
from qaxis.storage.side import Side, Stored
from selfcheck.inputs.adversarial import make

from .layouts import LAYOUTS

#: what takes a step's arguments, made alike: the public one, and the Triton step by itself
ENTRIES = {"Decoder": Decoder, "TritonStep": TritonStep}


def bell(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(x: torch.Tensor, grid: Grid | None = None, sinks: int = 0) -> Stored:
    side = Side(x, grid or Grid(), sinks)
    side.prepare(x)()
    return side.stored()


def check(step: Any, q: torch.Tensor, k: torch.Tensor | Stored, v: torch.Tensor | Stored, k_eff: int) -> None:
    """The result of a step is that of the reference, to the bit."""
    k, v = (x.dequantized() if isinstance(x, Stored) else x for x in (k, v))
    exact = qaxis.topk_attention(q, k, v, k_eff)
    assert torch.equal(step.indices, exact.indices) and torch.equal(step.output, exact.output)


def test_ties_go_to_the_lower_position():
    q, k, v = (
        bell(1, 2, 1, 32),
        bell(1, 1, 1, 32, seed=1).expand(1, 1, 150, 32).contiguous(),
        bell(1, 1, 150, 32, seed=2),
    )
    step = TritonStep(1, 2, 150, 32, 40, "cpu")(q, k, v, index_keys(k))
    assert torch.equal(step.indices, torch.arange(40).expand(1, 2, 1, 40))


def test_a_decoder_keeps_nothing_from_one_step_to_the_next():
    decoder = TritonStep(1, 4, 400, 32, 30, "cpu")
    for seed in range(3):
        q, k, v = bell(1, 4, 1, 32, seed=seed), bell(1, 2, 400, 32, seed=seed + 10), bell(1, 2, 400, 32, seed=seed + 20)
        step = decoder(q, k, v, index_keys(k, codes=seed == 1))
        check(step, q, k, v, 30)
        assert int(step.rescored.sum(-1).min()) >= 30


@pytest.mark.parametrize("kind", ["outlier key", "coarse scales"])
def test_codes_that_are_nearly_all_zero_are_ranked_by_both_parts_of_the_query(kind):
    q, k, v = make(kind, (1, 3, 1, 1, 270, 32), torch.bfloat16, torch.Generator().manual_seed(0))
    keys, values = stored(k, sinks=4), stored(v, sinks=4)
    check(TritonStep(1, 3, 270, 32, 90, "cpu")(q, keys, values, index_cache(keys)), q, keys, values, 90)


def test_tuning_changes_no_bit():
    q, k, v = bell(1, 4, 1, 64), bell(1, 2, 700, 64, seed=1), bell(1, 2, 700, 64, seed=2)
    # Few candidates in registers, so that the others are read again; many short stretches.
    tuning = Tuning(
        block=32, loop=1, threshold=16, stretch=64, lines=1, rescore=16, rescore_programs=12, choose=32, choose_out=32,
        attend=16,
    )  # fmt: skip
    check(TritonStep(1, 4, 700, 64, 90, "cpu", tuning)(q, k, v, index_keys(k)), q, k, v, 90)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("outlier", [1, 300])
def test_fast_scores_are_within_their_error(codes, outlier):
    q, k = bell(1, 4, 1, 64), bell(1, 2, 512, 64, seed=1)
    k[..., 0] *= outlier
    index = index_keys(k, codes=codes)
    decoder = TritonStep(1, 4, 512, 64, 50, "cpu")
    decoder.score(q, k, index, decoder.full)
    start, end = 0, 512
    exact = canonical_scores(q, k)[0, :, 0, start:end].double()
    norm_q = q[0, :, 0].norm(dim=-1)[:, None].double()
    norm_k, residual = (x[0].repeat_interleave(2)[:, None].double() for x in (index.norm, index.residual))
    units = bounds.UNITS / (norm_q * norm_k * 1.001)
    error = norm_q * (residual + bounds.rounding(64) * (3 if codes else 1) * norm_k)
    if codes:
        largest = index.largest_scales[0].repeat_interleave(2, 0)
        error += (q[0, :, 0].abs() * largest).amax(-1, keepdim=True).double() * bounds.SPLIT * 64
    off = (decoder.fast[:, start:end].double() - 32768 + 0.5 - exact * units).abs() - 0.5
    assert bool((off <= error * units * 1.01 + 1).all())
    # A bound that nothing comes near would prove little; a product of the keys is off by less than a 16-bit step.
    assert not codes or float((off / (error * units * 1.01 + 1)).max()) > 0.03


# ---- any layout in memory -------------------------------------------------------------------------------------------

SIZES = (2, 2, 20, 16)


@pytest.fixture(scope="module")
def decoders() -> dict[str, Any]:
    """One of each for every layout: what one has seen must not matter to the next."""
    b, h, n, d = SIZES
    made = {name: make(b, h, n, d, 5, "cpu") for name, make in ENTRIES.items()}
    q, k, v = (bell(b, h, m, d, seed=9 + m) for m in (1, n, n))
    for decoder in made.values():
        check(decoder(q, k, v, index_keys(k)), q, k, v, 5)
    return made


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout(decoders, entry, name):
    # q, k and v are laid out each in its own way; by turns all are in every way.
    names, (b, h, n, d) = list(LAYOUTS), SIZES
    q, k, v = (
        LAYOUTS[names[(names.index(name) + shift) % len(names)]](bell(b, h, m, d, seed=shift))
        for m, shift in ((1, 0), (n, 5), (n, 10))
    )
    check(decoders[entry](q, k, v, index_keys(k)), q, k, v, 5)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["order BHDN", "row of one more", "every second channel", "shifted by one"])
def test_codes_of_any_layout(entry, name):
    q, k, v = bell(1, 2, 1, 64), bell(1, 1, 150, 64, seed=1), bell(1, 1, 150, 64, seed=2)
    index = index_keys(k, codes=True)
    assert index.codes is not None
    lay = LAYOUTS[name]
    codes = dataclasses.replace(index.codes, codes=lay(index.codes.codes), scales=lay(index.codes.scales))
    step = ENTRIES[entry](1, 2, 150, 64, 20, "cpu")(q, k, v, dataclasses.replace(index, codes=codes))
    check(step, q, k, v, 20)
    # A code misread is a candidate more, or one missed: few are rescored only if the codes were right.
    assert int(step.rescored.sum(-1).max()) < 75


def test_bounds_of_any_layout():
    q, k, v = bell(2, 2, 1, 16), bell(2, 2, 20, 16, seed=1), bell(2, 2, 20, 16, seed=2)
    k[0, 1] *= 100
    index = index_keys(k)
    norm, residual = index.norm.t().contiguous().t(), index.residual[:1].expand(2, 2)
    turned = KeyIndex(norm, residual, index.largest_scales[:1].expand(2, 2, 16))
    steps = [TritonStep(2, 2, 20, 16, 5, "cpu") for _ in range(2)]
    for step, given in zip(steps, (index, turned), strict=True):
        check(step(q, k, v, given), q, k, v, 5)
    # Even with a bound of another head the set may be right: the scores behind it are not.
    assert torch.equal(steps[0].fast[:, :20], steps[1].fast[:, :20])


@pytest.mark.parametrize("side", ["q", "k", "v"])
def test_strides_whose_products_are_beyond_32_bits(side):
    # Pages that nobody touches take no memory.
    stride = (1 << 31) // 15 + 16
    try:
        room = torch.empty(15 * stride + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no room for addresses")
    given = {
        "q": bell(1, 2, 1, 16).half(),
        "k": bell(1, 1, 4, 16, seed=1).half(),
        "v": bell(1, 1, 4, 16, seed=2).half(),
    }
    small = given[side]
    given[side] = room.as_strided(small.shape, (32, 16, 1, stride)).copy_(small)
    q, k, v = given["q"], given["k"], given["v"]
    check(TritonStep(1, 2, 4, 16, 2, "cpu")(q, k, v, index_keys(k)), q, k, v, 2)


def test_no_grid_has_a_second_dimension(monkeypatch):
    # It would end at 65535 rows.
    grids = []
    set_grid_dim = InterpreterBuilder.set_grid_dim

    def observed(builder: InterpreterBuilder, *grid: int) -> None:
        grids.append(grid)
        set_grid_dim(builder, *grid)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_dim", observed)
    q, k, v = bell(2, 4, 1, 32), bell(2, 2, 150, 32, seed=1), bell(2, 2, 150, 32, seed=2)
    for codes in (False, True):
        TritonStep(2, 4, 150, 32, 5, "cpu")(q, k, v, index_keys(k, codes=codes))
    assert len(grids) >= 12 and all(grid[1:] == (1, 1) for grid in grids)


# ---- caches ---------------------------------------------------------------------------------------------------------

GROUPS_OF_64 = Grid(8, "channel", 64)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "dtype, keys, key_sinks, values, value_sinks",
    [
        # What the CUDA kernels take for one cache's they must not take for the other's.
        (torch.bfloat16, Grid(), 4, GROUPS_OF_64, 4),
        (torch.bfloat16, Grid(), 4, Grid(), 0),
        (torch.bfloat16, GROUPS_OF_64, 0, Grid(8, "token", 64), 4),
        (torch.float32, Grid(), 4, None, 0),
        (torch.bfloat16, None, 0, Grid(), 4),
    ],
)
def test_caches_of_different_formats(entry, dtype, keys, key_sinks, values, value_sinks):
    q, k, v = bell(1, 2, 1, 64).to(dtype), bell(1, 1, 200, 64, seed=1).to(dtype), bell(1, 1, 200, 64, seed=2).to(dtype)
    k, index = (k, index_keys(k)) if keys is None else ((c := stored(k, keys, key_sinks)), index_cache(c))
    v = v if values is None else stored(v, values, value_sinks)
    check(ENTRIES[entry](1, 2, 200, 64, 20, "cpu")(q, k, v, index), q, k, v, 20)


# ---- form -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch": 0}, "batch=0"), ({"heads": -1}, "heads=-1"), ({"n": 0}, "n=0"), ({"head_dim": 0}, "head_dim=0"),
        ({"n": (1 << 31) - 2}, "n=2147483646"), ({"heads": 2.0}, "heads=2.0"), ({"k_eff": 0}, "k_eff=0"),
        ({"k_eff": 11}, "k_eff=11"), ({"k_eff": True}, "k_eff=True"), ({"device": "meta"}, "device='meta'"),
        ({"device": "nowhere"}, "device='nowhere'"),
    ],
)  # fmt: skip
def test_sizes_that_are_not_allowed(entry, change, message):
    sizes = {"batch": 1, "heads": 2, "n": 10, "head_dim": 32, "k_eff": 5, "device": "cpu"}
    with pytest.raises(ValueError, match=f"^{message}: allowed is"):
        ENTRIES[entry](**(sizes | change))


def _given() -> SimpleNamespace:
    """Arguments that fit each other: B, H, Hkv, N, D = 2, 4, 2, 200, 32."""
    q, k, v = bell(2, 4, 1, 32), bell(2, 2, 200, 32, seed=1), bell(2, 2, 200, 32, seed=2)
    return SimpleNamespace(q=q, k=k, v=v, index=index_keys(k), scale=None)


def _replaced(x: Any, path: list[str], f: Callable[[Any], Any]) -> Any:
    if not path:
        return f(x)
    return dataclasses.replace(x, **{path[0]: _replaced(getattr(x, path[0]), path[1:], f)})


def _coded(given: SimpleNamespace, grid: Grid | None = None) -> None:
    """The index has codes of the keys."""
    given.index = dataclasses.replace(given.index, codes=stored(given.k, grid))


def _other(name: str, f: Callable[[Any], Any]) -> Callable[[SimpleNamespace], None]:
    """One argument alone becomes another, or the part of it that ``name`` leads to."""

    def change(given: SimpleNamespace) -> None:
        if name.startswith("index.codes."):
            _coded(given)
        first, *path = name.split(".")
        setattr(given, first, _replaced(getattr(given, first), path, f))

    return change


def _cached(given: SimpleNamespace, **changes: Any) -> None:
    """The keys become a cache, with the index of it; then parts of the cache change."""
    keys = stored(given.k)
    given.index, given.k = index_cache(keys), dataclasses.replace(keys, **changes)


def _wrong_scales(v: torch.Tensor) -> Stored:
    values = stored(v)
    return dataclasses.replace(values, scales=values.scales.view(torch.uint8))


def _one_head(x: torch.Tensor) -> torch.Tensor:
    """At the same place, of the same shape, other numbers."""
    return x[:, :1].expand_as(x)


def meta(x: torch.Tensor) -> torch.Tensor:
    return x.to("meta")


#: what a step must say, and what was changed
MISFITS: list[tuple[str, Callable[[SimpleNamespace], None]]] = [
    (r"q='list'", _other("q", lambda q: q.tolist())),
    (r"q\.shape=\(2, 4, 32\)", _other("q", lambda q: q[:, :, 0])),
    (r"q\.shape=\(2, 0, 1, 32\)", _other("q", lambda q: q[:, :0])),
    (r"q\.shape\[0\]=1", _other("q", lambda q: q[:1])),
    (r"q\.shape\[1\]=8", _other("q", lambda q: q.repeat(1, 2, 1, 1))),
    (r"q\.shape\[2\]=2", _other("q", lambda q: q.repeat(1, 1, 2, 1))),
    (r"q\.shape\[3\]=16", _other("q", lambda q: q[..., :16])),
    (r"q\.dtype=torch\.int64", _other("q", torch.Tensor.long)),
    (r"q\.device='meta'", _other("q", meta)),
    (r"k\.dtype=torch\.float32: allowed is q's dtype torch\.float16", _other("q", torch.Tensor.half)),
    (r"k='NoneType'", _other("k", lambda k: None)),
    (r"k\.layout=torch\.sparse_coo", _other("k", torch.Tensor.to_sparse)),
    (r"k\.shape=\(2, 2, 0, 32\)", _other("k", lambda k: k[:, :, :0])),
    (r"k\.shape\[0\]=1", _other("k", lambda k: k[:1])),
    (r"q\.shape\[1\]=4: allowed is a multiple of k's 3 heads", _other("k", lambda k: k[:, [0, 1, 1]])),
    (r"k\.shape\[2\]=199", _other("k", lambda k: k[:, :, 1:])),
    (r"k\.shape\[3\]=16", _other("k", lambda k: k[..., :16])),
    (r"k\.dtype=torch\.bfloat16", _other("k", torch.Tensor.bfloat16)),
    (r"k\.device='meta'", _other("k", meta)),
    (r"v\.shape=\(2, 2, 200, 0\)", _other("v", lambda v: v[..., :0])),
    (r"v\.shape\[:3\]=\(1, 2, 200\)", _other("v", lambda v: v[:1])),
    (r"v\.shape\[:3\]=\(2, 1, 200\)", _other("v", lambda v: v[:, :1])),
    (r"v\.shape\[:3\]=\(2, 2, 20\)", _other("v", lambda v: v[:, :, :20])),
    (r"v\.dtype=torch\.float16", _other("v", torch.Tensor.half)),
    (r"v\.device='meta'", _other("v", meta)),
    (r"scale=0", _other("scale", lambda _: 0)),
    (r"scale=-1", _other("scale", lambda _: -1)),
    (r"scale=nan", _other("scale", lambda _: float("nan"))),
    # The index.
    (r"index='NoneType'", _other("index", lambda _: None)),
    (r"index\.norm\.shape=\(2, 1\)", _other("index.norm", lambda x: x[:, :1])),
    (r"index\.norm\.dtype=torch\.float64", _other("index.norm", torch.Tensor.double)),
    (r"index\.residual\.shape=\(1, 2\)", _other("index.residual", lambda x: x[:1])),
    (r"index\.residual\.device='meta'", _other("index.residual", meta)),
    (r"index\.largest_scales\.shape=\(2, 2, 16\)", _other("index.largest_scales", lambda x: x[..., :16])),
    (r"index\.codes='int'", _other("index.codes", lambda _: 1)),
    (r"index\.codes\.shape=\(2, 2, 199, 32\)", _other("index.codes.newest", lambda x: x[:, :, 1:])),
    (r"index\.codes\.codes\.shape=\(2, 2, 100, 32\)", _other("index.codes.codes", lambda x: x[:, :, :100])),
    (r"index\.codes\.codes\.dtype=torch\.uint8", _other("index.codes.codes", lambda x: x.view(torch.uint8))),
    (r"index\.codes\.scales\.shape=\(2, 2, 0, 32\)", _other("index.codes.scales", lambda x: x[:, :, :0])),
    (r"index\.codes\.scales\.device='meta'", _other("index.codes.scales", meta)),
    (r"index\.codes\.grid=Grid\(bits=4", lambda given: _coded(given, Grid(4))),
    (r"index\.codes\.grid=.*per='token'", lambda given: _coded(given, Grid(8, "token", 32))),
    (r"index\.codes\.grid=.*group_size=32", lambda given: _coded(given, Grid(8, "channel", 32))),
    # Caches.
    (r"k='4 bits of torch\.float32'", _other("k", lambda k: stored(k, Grid(4)))),
    (r"k='8 bits of torch\.float16'", _other("k", lambda k: stored(k.half()))),
    (r"v='8 bits of torch\.float16'", _other("v", lambda v: stored(v.half()))),
    (r"v='5 bits of torch\.float32'", _other("v", lambda v: stored(v, Grid(5, zero=True)))),
    (r"v\.dtype=torch\.bfloat16", _other("v", lambda v: stored(v.bfloat16()))),
    (r"v\.scales\.dtype=torch\.uint8", _other("v", _wrong_scales)),
    (r"v\.shape\[:3\]=\(2, 1, 200\)", _other("v", lambda v: stored(v[:, :1]))),
    (r"index\.codes='NoneType'", _other("k", stored)),
    # An index of another cache, of other codes, and of a cache that has grown since.
    (r"index\.codes='Stored'", lambda given: _cached(given, **vars(stored(given.k)))),
    (r"index\.codes='Stored'", lambda given: _cached(given, codes=stored(given.k).codes)),
    (r"index\.codes='Stored'", lambda given: _cached(given, newest=bell(2, 2, 72, 32))),
    (r"index\.codes='Stored'", lambda given: (_cached(given), _other("k.newest", _one_head)(given))),
]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("message, change", MISFITS, ids=[f"{i} {m}" for i, (m, _) in enumerate(MISFITS)])
def test_what_does_not_fit_is_named(entry, message, change):
    given = _given()
    change(given)
    with pytest.raises(ValueError, match=f"^{message}"):
        ENTRIES[entry](2, 4, 200, 32, 20, "cpu")(given.q, given.k, given.v, given.index, given.scale)


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_same_state_of_a_cache_may_be_seen_twice(entry):
    side = Side(bell(1, 1, 1, 32), Grid())
    side.prepare(bell(1, 1, 150, 32))()
    q, k, v = bell(1, 2, 1, 32), side.stored(), bell(1, 1, 150, 32, seed=2)
    check(ENTRIES[entry](1, 2, 150, 32, 20, "cpu")(q, k, v, index_cache(side.stored())), q, k, v, 20)


def test_an_index_is_made_of_keys_alone():
    k = bell(1, 1, 200, 32)
    for given, message in [
        (k[0], r"k\.shape=\(1, 200, 32\)"), (k[:, :, :0], r"k\.shape=\(1, 1, 0, 32\)"),
        (k.long(), r"k\.dtype=torch\.int64"), (stored(k), "k='Stored'"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{message}: allowed is"):
            index_keys(given)
    for given, message in [
        (k, "stored='Tensor'"), (stored(k, Grid(4)), r"stored\.grid=Grid\(bits=4"),
        (stored(k, Grid(8, "token", 32)), r"stored\.grid=Grid\(bits=8, per='token'"),
        (stored(k, Grid(8, "channel", 100)), r"stored\.grid=.*group_size=100"),
        (stored(k.half()), r"stored\.dtype=torch\.float16"),
        (dataclasses.replace(stored(k), newest=k[:, :, :10, :16]), r"stored\.newest\.shape=\(1, 1, 10, 16\)"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{message}.*: allowed is"):
            index_cache(given)

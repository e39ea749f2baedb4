"""The CUDA C++ outside its claims: what it leaves to Triton, room that runs out, the emulator's own behaviour."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch

import qaxis
from qaxis import decode
from qaxis.cuda import compiler, emulator
from qaxis.decode.cuda import takes
from qaxis.storage.grid import Grid
from qaxis.storage.side import Side, Stored

from .layouts import LAYOUTS

needs_compiler = pytest.mark.skipif(not emulator.available(), reason="g++ is needed to emulate CUDA")


def bell(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(step: Any, q: torch.Tensor, k: torch.Tensor | Stored, v: torch.Tensor | Stored, k_eff: int) -> None:
    """The result of a step is that of the reference, to the bit."""
    k, v = (x.dequantized() if isinstance(x, Stored) else x for x in (k, v))
    exact = qaxis.topk_attention(q, k, v, k_eff)
    assert torch.equal(step.indices, exact.indices) and torch.equal(step.output, exact.output)


@needs_compiler
@pytest.mark.parametrize("codes", [False, True])
def test_a_step_has_the_canonical_bits(codes):
    q, k, v = (bell(1, h, n, 64, seed=s, dtype=torch.bfloat16) for h, n, s in ((6, 1, 0), (2, 900, 1), (2, 900, 2)))
    decoder = decode.Decoder(1, 6, 900, 64, 120, "cpu")
    index = decode.index_keys(k, codes=codes)
    assert decoder.cuda_step(q, k, v, index) is not None
    step = decoder(q, k, v, index)
    check(step, q, k, v, 120)
    assert int(step.rescored.sum(-1).min()) >= 120


@needs_compiler
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_codes_of_every_head_dim_and_group(dim, group):
    q, k, v = (bell(1, h, n, dim, seed=h + n, dtype=torch.bfloat16) for h, n in ((group, 1), (1, 900), (1, 900)))
    decoder, index = decode.Decoder(1, group, 900, dim, 40, "cpu"), decode.index_keys(k, codes=True)
    assert decoder.engine(q, k, v, index) == ("cuda", "")
    step = decoder(q, k, v, index)
    check(step, q, k, v, 40)
    # Codes told most keys apart.
    assert int(step.rescored.sum(-1).max()) < 400


@needs_compiler
def test_ties_beyond_any_room_go_to_the_lower_positions():
    q, v = bell(1, 2, 1, 32), bell(1, 1, 12000, 32, seed=2)
    k = bell(1, 1, 1, 32, seed=1).expand(1, 1, 12000, 32).contiguous()
    decoder = decode.Decoder(1, 2, 12000, 32, 40, "cpu")
    index = decode.index_keys(k)
    fast = decoder.cuda_step(q, k, v, index)
    step = decoder(q, k, v, index)
    # Every key is a candidate: more than a program has room for.
    assert int(step.rescored.max()) > fast.plan.room
    assert torch.equal(step.indices, torch.arange(40).expand(1, 2, 1, 40))
    assert torch.equal(step.output, qaxis.topk_attention(q, k, v, 40).output)


@needs_compiler
def test_where_all_keys_are_scored_in_the_end_as_many_are_told():
    q, v = bell(1, 2, 1, 64), bell(1, 1, 12000, 64, seed=2)
    k = bell(1, 1, 1, 64, seed=1).expand(1, 1, 12000, 64).contiguous()
    step = decode.Decoder(1, 2, 12000, 64, 40, "cpu")(q, k, v, decode.index_keys(k, codes=True))
    assert torch.equal(step.indices, torch.arange(40).expand(1, 2, 1, 40))
    assert step.rescored.sum(-1).flatten().tolist() == [12000, 12000]


@needs_compiler
def test_a_decoder_keeps_nothing_from_one_step_to_the_next():
    decoder = decode.Decoder(1, 4, 700, 32, 30, "cpu")
    for seed in range(3):
        q, k, v = bell(1, 4, 1, 32, seed=seed), bell(1, 2, 700, 32, seed=seed + 10), bell(1, 2, 700, 32, seed=seed + 20)
        check(decoder(q, k, v, decode.index_keys(k)), q, k, v, 30)


@needs_compiler
@pytest.mark.parametrize("name", ["keys", "codes"])
# With fewer than 128 keys none has a code.
@pytest.mark.parametrize("n", [100, 500, 512, 1025])
def test_lengths_about_a_block(name, n):
    q, k, v = bell(1, 8, 1, 64), bell(1, 1, n, 64, seed=1), bell(1, 1, n, 64, seed=2)
    step = decode.Decoder(1, 8, n, 64, n // 2, "cpu")(q, k, v, decode.index_keys(k, codes=name == "codes"))
    check(step, q, k, v, n // 2)


# ---- any layout in memory -------------------------------------------------------------------------------------------

#: B, H, N, D, the kernels' rows being 16 float32 numbers, four loads
SIZES = (2, 2, 40, 16)
#: what the kernels read as it lies
READ = {
    "order BHND", "order BNHD", "order NBHD", "row of 16 more", "part of a larger one", "every second token",
    "one batch for all", "one head for all", "one token for all",
}  # fmt: skip


@pytest.fixture(scope="module")
def decoder() -> decode.Decoder:
    """One for every layout, which has seen contiguous tensors."""
    b, h, n, d = SIZES
    made = decode.Decoder(b, h, n, d, 9, "cpu")
    q, k, v = (bell(b, h, m, d, seed=9 + m) for m in (1, n, n))
    check(made(q, k, v, decode.index_keys(k)), q, k, v, 9)
    return made


@needs_compiler
@pytest.mark.parametrize("side", ["q", "k", "v"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout(decoder, name, side):
    b, h, n, d = SIZES
    given = {"q": bell(b, h, 1, d), "k": bell(b, h, n, d, seed=1), "v": bell(b, h, n, d, seed=2)}
    given[side] = LAYOUTS[name](given[side])
    q, k, v = given.values()
    index = decode.index_keys(k)
    # The one token of a query lies together in that order too.
    read = name in READ or (name == "order BHDN" and side == "q")
    assert (decoder.cuda_step(q, k, v, index) is not None) == read
    check(decoder(q, k, v, index), q, k, v, 9)


@needs_compiler
def test_strides_that_the_kernels_cannot_hold_are_left_to_triton():
    # Pages that nobody touches take no memory.
    try:
        room = torch.empty((1 << 31) + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no room for addresses")

    def far(x: torch.Tensor, *strides: int) -> torch.Tensor:
        return room.as_strided(x.shape, strides).copy_(x)

    q, k, v = (bell(2, 1, n, 16, seed=n + s, dtype=torch.float16) for n, s in ((1, 0), (2, 0), (2, 1)))
    decoder = decode.Decoder(2, 1, 2, 16, 1, "cpu")
    given = [
        (far(q, 1 << 31, 16, 16, 1), k, v), (q, far(k, 16, 16, 1 << 30, 1), v), (q, k, far(v, 16, 16, 1 << 30, 1)),
        # As far, but read.
        (q, far(k, 1 << 30, 16, 16, 1), v), (q, far(k, 32, 16, 1 << 29, 1), v),
    ]  # fmt: skip
    for i, (q, k, v) in enumerate(given):
        index = decode.index_keys(k)
        assert (decoder.cuda_step(q, k, v, index) is None) == (i < 3)
        check(decoder(q, k, v, index), q, k, v, 1)


def test_more_rows_than_a_grid_has_are_left_to_triton():
    for rows, taken in ((65535, True), (65536, False)):
        q, k = torch.zeros(1, 1, 1, 16).expand(rows, 1, 1, 16), torch.zeros(1, 1, 2, 16).expand(rows, 1, 2, 16)
        assert takes(q, k, k, decode.index_keys(k)) == taken


@needs_compiler
def test_an_emulated_kernel_refuses_what_a_gpu_could_not_take():
    nothing = emulator.compiled('extern "C" __global__ void nothing(int x) {}', "nothing", [])
    nothing((1, 65535, 1), (32, 1, 1), [0])
    for grid in ((1, 65536, 1), (1, 1, 2)):
        with pytest.raises(ValueError, match=r"^grid=\(1, "):
            nothing(grid, (32, 1, 1), [0])
    with pytest.raises(ValueError, match="^argument=2147483648"):
        nothing((1, 1, 1), (32, 1, 1), [1 << 31])


def _stored(x: torch.Tensor, grid: Grid | None = None) -> Stored:
    side = Side(x, grid or Grid(), sinks=4)
    side.prepare(x)()
    return side.stored()


@needs_compiler
def test_caches_that_the_kernels_read_and_those_they_leave_to_triton():
    # 190 tokens are 128 in codes, in groups of 128 as of 64.
    q, k, v = (bell(1, h, n, 64, seed=s, dtype=torch.bfloat16) for h, n, s in ((2, 1, 0), (1, 190, 1), (1, 190, 2)))
    keys, values = _stored(k), _stored(v)
    decoder = decode.Decoder(1, 2, 190, 64, 30, "cpu")
    index, beside = decode.index_cache(keys), decode.index_keys(k, codes=True)
    # 16 bytes of codes, or four bounds, are read at once.
    wide = torch.zeros(2, 1, 128, 72, dtype=torch.int8)[..., :64]
    rows_of_72 = dataclasses.replace(keys, codes=wide[:1].copy_(keys.codes))
    codes_of_72 = dataclasses.replace(beside.codes, codes=wide[1:].copy_(beside.codes.codes))
    shifted = torch.empty(65)[1:].view(1, 1, 64).copy_(index.largest_scales)
    for given, taken in [
        ((keys, values, index), True),
        ((keys, dataclasses.replace(values, first=values.first[:, :, :2]), index), False),
        ((keys, _stored(v, Grid(8, "channel", 64)), index), False),
        ((keys, _stored(v, Grid(8, "token", 64)), index), False),
        ((keys, v, index), False),
        ((k, values, decode.index_keys(k)), False),
        ((rows_of_72, values, decode.index_cache(rows_of_72)), False),
        ((k, v, beside), True),
        ((k, v, dataclasses.replace(beside, codes=codes_of_72)), False),
        ((keys, values, dataclasses.replace(index, largest_scales=shifted)), False),
    ]:
        assert (decoder.cuda_step(q, *given) is not None) == taken
        check(decoder(q, *given), q, *given[:2], 30)


def test_what_it_does_not_run_is_left_to_triton():
    q, k, v = bell(1, 2, 1, 48), bell(1, 1, 200, 48, seed=1), bell(1, 1, 200, 48, seed=2)
    decoder = decode.Decoder(1, 2, 200, 48, 20, "cpu")
    index = decode.index_keys(k)
    assert decoder.cuda_step(q, k, v, index) is None
    check(decoder(q, k, v, index), q, k, v, 20)


@needs_compiler
def test_a_step_is_kept_by_all_it_depends_on():
    q, k, v = bell(1, 2, 1, 32), bell(1, 2, 60, 32, seed=1), bell(1, 2, 60, 32, seed=2)
    decoder = decode.Decoder(1, 2, 60, 32, 20, "cpu")
    for kv_heads, dim_v, dtype in [(2, 32, torch.float32), (1, 32, torch.float32), (1, 16, torch.bfloat16)]:
        given = q.to(dtype), k[:, :kv_heads].to(dtype), v[:, :kv_heads, :, :dim_v].to(dtype)
        check(decoder(*given, decode.index_keys(given[1])), *given, 20)
    assert len(decoder.steps) == 3 and None not in decoder.steps.values()


def test_without_a_compiler_it_says_so_and_triton_runs(monkeypatch, caplog):
    monkeypatch.setattr(emulator, "available", lambda: False)
    compiler.compiled.cache_clear()
    q, k, v = bell(1, 2, 1, 32), bell(1, 1, 100, 32, seed=1), bell(1, 1, 100, 32, seed=2)
    step = decode.Decoder(1, 2, 100, 32, 10, "cpu")(q, k, v, decode.index_keys(k))
    compiler.compiled.cache_clear()
    assert torch.equal(step.indices, qaxis.topk_attention(q, k, v, 10).indices)
    assert "cannot be used" in caplog.text and "apt install g++" in caplog.text


@needs_compiler
def test_a_thread_that_waits_for_ever_is_named():
    kernel = 'extern "C" __global__ void stuck(int* p) { if (threadIdx.x != 5) __syncthreads(); *p = 1; }'
    script = (
        "import torch; from qaxis.cuda import emulator; "
        f"emulator.compiled({kernel!r}, 'stuck', [])((1, 1, 1), (64, 1, 1), [torch.zeros(1, dtype=torch.int32)])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0 and "thread 0 of program 0 waits for ever" in done.stderr


@needs_compiler
def test_what_the_compiler_says_is_passed_on():
    with pytest.raises(RuntimeError, match="nowhere"):
        emulator.compiled('extern "C" __global__ void f(int* p) { *p = nowhere; }', "f", [])


# ---- the cut that counts of a sample lead to ------------------------------------------------------------------------


def uneven(kind: str, n: int, dim: int, k_eff: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, keys and values of two heads over one KV head, whose scores mislead what is counted of them."""
    q, k, v = (bell(1, h, m, dim, seed=h + m, dtype=torch.bfloat16) for h, m in ((2, 1), (1, n), (1, n)))
    toward = q[:, :1]
    j = torch.arange(n)
    if kind == "one low key in 16":
        # Mean and spread of a warp's first keys put the place above all of them: nothing is counted.
        k[:, :, j % 16 == 5] = -200 * toward
    if kind == "a run of the best":
        k[:, :, n // 3 : n // 3 + k_eff + 9] += 2 * toward
    if kind == "the best outside the sample":
        k[:, :, (j // 16 ^ j // 128) % 8 != 0] += toward
    if kind == "the best inside the sample":
        k[:, :, (j // 16 ^ j // 128) % 8 == 0] += toward
    if kind == "channels of all sizes":
        # As in models: what is large in keys is small in queries.
        size = torch.logspace(-1, 1, dim)[torch.randperm(dim, generator=torch.Generator().manual_seed(1))].to(k.dtype)
        q, k = q / size, k * size
    return q, k, v


KINDS = [
    "one low key in 16", "a run of the best", "the best outside the sample", "the best inside the sample",
    "channels of all sizes",
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codes", [False, True])
def test_counts_that_mislead_cost_time_and_no_key(kind, codes):
    n, k_eff = 6000, 1100
    q, k, v = uneven(kind, n, 64, k_eff)
    decoder, index = decode.Decoder(1, 2, n, 64, k_eff, "cpu"), decode.index_keys(k, codes=codes)
    for _ in range(2):
        # Twice: a step leaves the counts as it found them.
        check(decoder(q, k, v, index), q, k, v, k_eff)
    made = decoder.cuda_step(q, k, v, index)
    assert made is not None and not made.buffers.tally.any()


@needs_compiler
@pytest.mark.parametrize("codes", [False, True])
def test_more_keys_than_there_is_room_for_of_which_none_was_counted(codes):
    n, k_eff = 12000, 40
    q, (_, k, v) = bell(1, 8, 1, 64, dtype=torch.bfloat16), uneven("plain", n, 64, k_eff)
    q = q[:, :1] + q / 2
    k[:, :, torch.arange(n) % 16 == 5] = -200 * q[:, :1]
    decoder, index = decode.Decoder(1, 8, n, 64, k_eff, "cpu"), decode.index_keys(k, codes=codes)
    check(decoder(q, k, v, index), q, k, v, k_eff)


@needs_compiler
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["plain", "channels of all sizes"])
def test_fast_scores_are_off_by_no_more_than_they_say(kind, scaled):
    n, groups = 3000, 3000 // 128
    q, k, v = uneven(kind, n, 64, 100)
    index = decode.index_keys(k, codes=True)
    index = index if scaled else dataclasses.replace(index, scaled_residuals=None)
    decoder = decode.Decoder(1, 2, n, 64, 100, "cpu")
    check(decoder(q, k, v, index), q, k, v, 100)
    made = decoder.cuda_step(q, k, v, index)
    assert made is not None
    work = made.buffers
    right = qaxis.canonical_scores(q, k)[0, :, 0, : groups * 128].double() * work.units[:, None].double()
    off = (work.fast[:, : groups * 128].double() - 32768 - right).abs().unflatten(1, (groups, 128)).amax(2)
    assert bool((off <= work.off[:, :groups]).all())
    # And not by much less, but for the slack of Cauchy-Schwarz.
    assert bool((off >= work.off[:, :groups] / (40 if scaled else 400)).all())


@needs_compiler
def test_uneven_channels_do_not_make_more_candidates():
    n, k_eff = 6000, 100
    q, k, v = uneven("channels of all sizes", n, 64, k_eff)
    index = decode.index_keys(k, codes=True)
    # By one length for all channels, as an index without the scaled ones has it, most keys are candidates.
    plain = decode.KeyIndex(index.norm, index.residual, index.largest_scales, index.codes)
    found = {}
    for name, used in (("scaled", index), ("plain", plain)):
        step = decode.Decoder(1, 2, n, 64, k_eff, "cpu")(q, k, v, used)
        check(step, q, k, v, k_eff)
        found[name] = int(step.rescored.sum(-1).max())
    assert found["scaled"] <= 4 * k_eff and found["plain"] > 2 * found["scaled"], found


@needs_compiler
def test_all_keys_are_kept_without_a_second_look():
    # More than are compared with each other: no bin of scores has an edge then.
    q, k, v = uneven("plain", 3000, 64, 3000)
    for codes in (False, True):
        step = decode.Decoder(1, 2, 3000, 64, 3000, "cpu")(q, k, v, decode.index_keys(k, codes=codes))
        check(step, q, k, v, 3000)


@pytest.mark.parametrize("change", ["shape", "dtype", "codes"])
def test_scaled_residuals_that_do_not_fit_are_named(change):
    q, k = bell(1, 2, 1, 64), bell(1, 1, 300, 64)
    index = decode.index_keys(k, codes=True)
    assert index.scaled_residuals is not None and index.scaled_residuals.shape == (1, 1, 2)
    given = {
        "shape": dataclasses.replace(index, scaled_residuals=index.scaled_residuals[:, :, :1]),
        "dtype": dataclasses.replace(index, scaled_residuals=index.scaled_residuals.double()),
        "codes": dataclasses.replace(index, codes=None),
    }[change]
    with pytest.raises(ValueError, match=r"^index\.scaled_residuals"):
        decode.Decoder(1, 2, 300, 64, 9, "cpu")(q, k, k, given)

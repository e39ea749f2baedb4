"""Numbers at the ends of float32, where fast scores once left their bound: what is chosen is right all the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import qaxis
from qaxis import decode
from qaxis.attention.always import NONE
from qaxis.attention.logits import Logits
from qaxis.cuda import emulator
from qaxis.prefill import prefill_attention, selected_positions
from qaxis.storage.grid import Grid
from qaxis.storage.side import Side, Stored

needs_compiler = pytest.mark.skipif(not emulator.available(), reason="g++ is needed to emulate CUDA")
D, N = 64, 700


def _bell(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _stored(x: torch.Tensor) -> Stored:
    side = Side(x, Grid())
    side.prepare(x)()
    return side.stored()


def _under_tiny_scales() -> tuple[torch.Tensor, Stored, Stored]:
    """Scales so small that a query scaled to 127 under them leaves float32; other channels make the keys longer."""
    q, k = _bell(1, 2, 1, D, seed=0) * 1e17, _bell(1, 1, N, D, seed=1) * 2e-36
    q[..., D // 2 :], k[..., D // 2 :] = 0, k[..., D // 2 :] * 20
    q, k, v = (x.bfloat16() for x in (q, k, _bell(1, 1, N, D, seed=2)))
    return q, _stored(k), _stored(v)


def _short_queries() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All squares but one are 0 in float32, so that the length comes out as a fraction of what it is."""
    q = _bell(1, 2, 1, D, seed=0).sign() * 2.6e-23
    q[..., 0] = 3.8e-23
    k = _bell(1, 1, N, D, seed=1) * 1e6
    k[:, :, ::128] *= 30
    return q.bfloat16(), k.bfloat16(), _bell(1, 1, N, D, seed=2).bfloat16()


def _check(step: Any, q: torch.Tensor, k: torch.Tensor | Stored, v: torch.Tensor | Stored, k_eff: int) -> None:
    k, v = (x.dequantized() if isinstance(x, Stored) else x for x in (k, v))
    exact = qaxis.topk_attention(q, k, v, k_eff, backend="reference")
    assert torch.equal(step.indices, exact.indices) and torch.equal(step.output, exact.output)


@needs_compiler
@pytest.mark.parametrize("way", ["cuda", "triton"])
def test_a_query_that_leaves_float32_under_the_scales_of_a_cache(way):
    q, k, v = _under_tiny_scales()
    decoder, index = decode.Decoder(1, 2, N, D, 30, "cpu"), decode.index_cache(k)
    if way == "cuda":
        assert decoder.cuda_step(q, k, v, index) is not None
        step = decoder(q, k, v, index)
    else:
        step = decoder._triton_step().run(q, k, v, index, decoder.all_rows, Logits(D**-0.5), NONE)
    _check(step, q, k, v, 30)
    # They are scored by codes all the same.
    assert int(step.rescored.sum(-1).max()) < N // 2


@needs_compiler
@pytest.mark.parametrize("numbers", ["under tiny scales", "short queries"])
def test_fast_scores_stay_within_their_bound_at_the_ends_of_float32(numbers):
    if numbers == "short queries":
        q, k, v = _short_queries()
        # One length for all channels: the query's own is part of the bound.
        index, exact = dataclasses.replace(decode.index_keys(k, codes=True), scaled_residuals=None), k
    else:
        q, k, v = _under_tiny_scales()
        index, exact = decode.index_cache(k), k.dequantized()
    decoder = decode.Decoder(1, 2, N, D, 30, "cpu")
    _check(decoder(q, k, v, index), q, k, v, 30)
    made = decoder.cuda_step(q, k, v, index)
    assert made is not None
    work, groups = made.buffers, N // 128
    right = qaxis.canonical_scores(q, exact)[0, :, 0, : groups * 128].double() * work.units[:, None].double()
    off = (work.fast[:, : groups * 128].double() - 32768 - right.clamp(-32768, 32767)).abs()
    assert bool((off.unflatten(1, (groups, 128)).amax(2) <= work.off[:, :groups]).all())


@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=needs_compiler)])
def test_a_prompt_whose_queries_are_too_short_for_a_length(backend):
    # Scores that their range does not hold would come back at its other end.
    q, k, v = _short_queries()
    q, k, v = q[:, :1].expand(1, 1, 4, D).contiguous(), k[:, :, :130], v[:, :, :130]
    out = prefill_attention(q, k, v, 7, selection=True, backend=backend)
    assert torch.equal(selected_positions(out.bits), qaxis.topk_indices(q, k, 7))

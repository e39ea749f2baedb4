"""The certified decode step outside its claim: ties, refusals, one decoder for many steps."""

from __future__ import annotations

import pytest
import torch

import qaxis
from qaxis import canonical_scores
from qaxis.arithmetic import fast_scores as bounds
from qaxis.decode import index_keys
from qaxis.decode.triton_step import Decoder, Tuning


def bell(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_ties_go_to_the_lower_position():
    q, k, v = (
        bell(1, 2, 1, 32),
        bell(1, 1, 1, 32, seed=1).expand(1, 1, 150, 32).contiguous(),
        bell(1, 1, 150, 32, seed=2),
    )
    step = Decoder(1, 2, 150, 32, 40, "cpu")(q, k, v, index_keys(k))
    assert torch.equal(step.indices, torch.arange(40).expand(1, 2, 1, 40))


def test_a_decoder_keeps_nothing_from_one_step_to_the_next():
    decoder = Decoder(1, 4, 400, 32, 30, "cpu")
    for seed in range(3):
        q, k, v = bell(1, 4, 1, 32, seed=seed), bell(1, 2, 400, 32, seed=seed + 10), bell(1, 2, 400, 32, seed=seed + 20)
        exact = qaxis.topk_attention(q, k, v, 30)
        step = decoder(q, k, v, index_keys(k, codes=seed == 1))
        assert torch.equal(step.indices, exact.indices) and torch.equal(step.output, exact.output)
        assert int(step.rescored.sum(-1).min()) >= 30


def test_tuning_changes_no_bit():
    q, k, v = bell(1, 4, 1, 64), bell(1, 2, 700, 64, seed=1), bell(1, 2, 700, 64, seed=2)
    exact = qaxis.topk_attention(q, k, v, 90)
    # Few candidates in registers, so that the others are read again; many short stretches.
    tuning = Tuning(
        block=32, loop=1, threshold=16, stretch=64, lines=1, rescore=16, rescore_programs=12, choose=32, choose_out=32,
        attend=16,
    )  # fmt: skip
    step = Decoder(1, 4, 700, 64, 90, "cpu", tuning)(q, k, v, index_keys(k))
    assert torch.equal(step.indices, exact.indices) and torch.equal(step.output, exact.output)


@pytest.mark.parametrize("n, k, message", [(0, 1, "n=0"), (10, 0, "k=0"), (10, 11, "k=11")])
def test_sizes_that_are_not_allowed(n, k, message):
    with pytest.raises(ValueError, match=message):
        Decoder(1, 2, n, 32, k, "cpu")


def test_other_shapes_than_it_was_made_for():
    decoder = Decoder(1, 2, 20, 32, 5, "cpu")
    q, k = bell(1, 2, 2, 32), bell(1, 1, 20, 32)
    with pytest.raises(ValueError, match=r"q\.shape\[2\]=2"):
        decoder(q, k, k, index_keys(k))
    with pytest.raises(ValueError, match=r"k\.shape\[2\]=19"):
        decoder(q[:, :, :1], k[:, :, :19], k, index_keys(k))


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("outlier", [1, 300])
def test_fast_scores_are_within_their_error(codes, outlier):
    q, k = bell(1, 4, 1, 64), bell(1, 2, 512, 64, seed=1)
    k[..., 0] *= outlier
    index = index_keys(k, codes=codes)
    decoder = Decoder(1, 4, 512, 64, 50, "cpu")
    start, end = decoder.score(q, k, index)
    exact = canonical_scores(q, k)[0, :, 0, start:end].double()
    norm_q = q[0, :, 0].norm(dim=-1)[:, None].double()
    norm_k, residual = (x[0].repeat_interleave(2)[:, None].double() for x in (index.norm, index.residual))
    units = bounds.UNITS / (norm_q * norm_k * 1.001)
    error = norm_q * (residual + bounds.rounding(64) * (3 if codes else 1) * norm_k)
    if codes:
        steps = index.steps[0].repeat_interleave(2, 0)
        error += (q[0, :, 0].abs() * steps).amax(-1, keepdim=True).double() * bounds.SPLIT * 64
    off = (decoder.fast[:, start:end].double() - 32768 + 0.5 - exact * units).abs() - 0.5
    assert bool((off <= error * units * 1.01 + 1).all())
    # A bound that nothing comes near would prove little; a product of the keys is off by less than a 16-bit step.
    assert not codes or float((off / (error * units * 1.01 + 1)).max()) > 0.03

"""The certified decode step outside its claim: ties, refusals, one decoder for many steps."""

from __future__ import annotations

import pytest
import torch

import qaxis
from qaxis.certified import Decoder, Tuning, index_keys


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
        block=32, loop=1, threshold=16, stretch=64, compact=64, rescore=16, rescore_chunks=3, choose=32, attend=16
    )
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

"""What a mask shows in a few numbers: only what those numbers describe, and never after somebody wrote to it."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from qaxis.models.masks import Shown, ShownMask, left_pads, make_mask


def made(m, n, **kwargs):
    kwargs.setdefault("q_offset", n - m)
    return make_mask(batch_size=2, q_length=m, kv_length=n, device="cpu", **kwargs)


PADDED = torch.ones(2, 12, dtype=torch.bool)
PADDED[1, :5] = False


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("padding", [None, PADDED, torch.ones(2, 12, dtype=torch.bool)])
@pytest.mark.parametrize("m", [1, 3, 12])
def test_the_numbers_describe_the_mask(m, padding, window):
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    arguments = {"mask_function": function, "attention_mask": padding, "local_size": window}
    mask = made(m, 12, allow_is_causal_skip=False, **arguments)
    whole = sdpa_mask(2, m, 12, q_offset=12 - m, allow_is_causal_skip=False, device="cpu", **arguments)
    assert isinstance(mask, ShownMask) and torch.equal(mask.whole(), whole.expand(2, 1, m, 12))
    position, key = torch.arange(12 - m, 12)[:, None], torch.arange(12)[None, :]
    pads = torch.zeros(2, dtype=torch.int32) if mask.shown.pads is None else mask.shown.pads
    said = (key <= position) & (key > position - (mask.shown.window or 12)) & (key >= pads[:, None, None])
    assert torch.equal(said[:, None], mask.whole())
    assert (mask.shown.pads is None) == (padding is not PADDED)


def test_no_mask_is_made_where_its_absence_cannot_be_misread():
    assert made(1, 12) is None
    assert made(1, 12, attention_mask=PADDED) is not None
    assert made(3, 12) is not None


def test_a_window_that_hides_nothing_yet_is_told():
    """What is captured then is repeated for tokens from which it hides some."""
    mask = made(1, 12, local_size=20, mask_function=sliding_window_causal_mask_function(20))
    assert mask.shown == Shown(window=20) and mask.whole().all()
    # Of a chunk all is seen until the next one begins: that lasts for these tokens alone.
    chunk = torch.zeros(2, dtype=torch.int32)
    mask = made(1, 12, local_size=20, mask_function=chunked_causal_mask_function(20, chunk))
    assert not mask.shown.lasts and mask.whole().all()
    assert type(made(1, 32, local_size=20, mask_function=chunked_causal_mask_function(20, chunk))) is torch.Tensor


@pytest.mark.parametrize(
    "arguments",
    [
        {"mask_function": or_masks(causal_mask_function, lambda b, h, q, k: k < 2)},
        {"mask_function": and_masks(causal_mask_function, lambda b, h, q, k: k % 2 == 0)},
        # A window of another width than the one that is named.
        {"mask_function": sliding_window_causal_mask_function(5), "local_size": 4},
        {"mask_function": causal_mask_function, "local_size": 4},
        # Queries that are not the last.
        {"q_offset": 3},
        {"attention_mask": PADDED.flip(1)},
        {"attention_mask": torch.tensor([[True] * 12, [True, False] * 6])},
    ],
)
def test_what_the_numbers_cannot_describe_is_a_mask(arguments):
    mask = made(3, 12, **arguments)
    assert type(mask) is torch.Tensor
    arguments = {"q_offset": 9, **arguments}
    assert torch.equal(mask, sdpa_mask(2, 3, 12, allow_is_causal_skip=False, device="cpu", **arguments))


@pytest.mark.parametrize(
    "write",
    [
        lambda mask: mask.fill_(True),
        lambda mask: mask[:, :, 0].fill_(False),
        lambda mask: mask.__setitem__((0, 0, 0, 0), False),
        lambda mask: torch.logical_not(mask, out=mask),
    ],
)
def test_what_may_have_been_written_to_is_described_no_more(write):
    mask = made(3, 12, attention_mask=PADDED)
    before = mask.whole().clone()
    write(mask)
    assert mask.shown is None and not torch.equal(mask.whole(), before)


def test_reading_leaves_the_description():
    mask = made(3, 12, attention_mask=PADDED)
    assert torch.equal(mask & True, mask.whole()) and mask.shape == (2, 1, 3, 12)
    assert isinstance(mask.shown, Shown)


def test_left_pads():
    assert left_pads(None, 0, 12) is None
    assert left_pads(PADDED, 0, 12).tolist() == [0, 5]
    assert left_pads(PADDED, 3, 9).tolist() == [0, 2]
    assert left_pads(PADDED, 6, 6) is None
    assert left_pads(PADDED.flip(1), 0, 12) is False
    assert left_pads(PADDED, 3, 12) is False
    assert left_pads(torch.zeros(1, 4), 0, 4).tolist() == [4]

"""What a mask shows in a few numbers: only what those numbers describe, and never after somebody wrote to it."""

from __future__ import annotations

import copy
import io
import pickle

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

from qaxis.models import masks
from qaxis.models.masks import Shown, ShownMask, ToldMask, dropped_before, left_pads, make_mask


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
    assert type(made(1, 32, local_size=20, mask_function=chunked_causal_mask_function(20, chunk))) is ToldMask


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
    assert type(mask) is ToldMask
    arguments = {"q_offset": 9, **arguments}
    assert torch.equal(mask, sdpa_mask(2, 3, 12, allow_is_causal_skip=False, device="cpu", **arguments))


@pytest.mark.parametrize(
    "write",
    [
        lambda mask: mask.fill_(True),
        lambda mask: mask[:, :, 0].fill_(False),
        lambda mask: mask.__setitem__((0, 0, 0, 0), False),
        lambda mask: torch.logical_not(mask, out=mask),
        lambda mask: setattr(mask, "data", torch.zeros(2, 1, 3, 12, dtype=torch.bool)),
        lambda mask: mask.data.fill_(False),
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


WINDOWED = {"q_offset": 29, "kv_offset": 20, "local_size": 12, "mask_function": sliding_window_causal_mask_function(12)}
SCATTERED = torch.ones(2, 32, dtype=torch.bool)
SCATTERED[1, 25] = False


def saved(mask):
    file = io.BytesIO()
    torch.save(mask, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("padding", [None, SCATTERED])
@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask.contiguous(),
        lambda mask: mask.clone().to("cpu", copy=True),
        lambda mask: mask.to("meta"),
        lambda mask: mask[:, :, -1:, :],
        lambda mask: mask[:, :, [0, 2]][1:],
        lambda mask: mask.contiguous()[:, :, 1:].expand(-1, 4, -1, -1).flatten(0, 1)[:, None],
        lambda mask: (mask & mask.new_ones(12).bool()) | mask,
        lambda mask: torch.stack([mask[0], mask[1]]),
        lambda mask: torch.stack(mask.split(1, 2), 2)[:, :, :, 0],
        lambda mask: mask.unbind()[1],
        lambda mask: mask.reshape(1, 2, 3, 12),
        copy.deepcopy,
        lambda mask: pickle.loads(pickle.dumps(mask)),
        saved,
        lambda mask: torch.empty(2, 1, 3, 12, dtype=torch.bool).copy_(mask) & mask,
    ],
)
def test_what_a_window_dropped_is_told_whatever_is_made_of_a_mask(change, padding):
    mask = made(3, 12, attention_mask=padding, **WINDOWED)
    assert isinstance(mask, ShownMask if padding is None else ToldMask)
    whole = (mask.whole() if padding is None else mask).as_subclass(torch.Tensor).clone()
    found = change(mask)
    assert dropped_before(found, 12, found.shape[2], 12) == dropped_before(mask, 12, 3, 12) == 20
    right = change(whole)
    assert type(right) is torch.Tensor and found.shape == right.shape and found.dtype == torch.bool
    assert found.is_meta or torch.equal(found, right)


@pytest.mark.parametrize("padding", [None, SCATTERED])
def test_what_is_no_mask_of_these_keys_tells_nothing(padding):
    mask, earlier = (made(3, 12, attention_mask=padding, **{**WINDOWED, "kv_offset": x}) for x in (20, 19))
    weights = torch.randn(2, 1, 3, 12)
    for found in (
        mask[..., 1:], mask.any(), mask.sum(-1), mask.float(), weights.masked_fill(mask, 0.0),
        torch.where(mask, weights, 0.0), mask & earlier.contiguous(), earlier & mask, mask.to_sparse(),
    ):  # fmt: skip
        assert type(found) is torch.Tensor


@pytest.mark.parametrize("padding", [None, PADDED])
@pytest.mark.parametrize("cut", [lambda mask: mask, lambda mask: mask[:, :, -2:]])
def test_a_described_mask_lies_in_memory_as_transformers_would_have_it(padding, cut):
    """Readers of memory and of strides find what they would find in the mask that it stands for."""
    mask, whole = cut(made(3, 12, attention_mask=padding)), cut(made(3, 12, attention_mask=padding).whole())
    assert isinstance(mask, ShownMask) and type(whole) is torch.Tensor
    assert mask.stride() == whole.stride() and mask.storage_offset() == whole.storage_offset()
    assert mask.tolist() == whole.tolist() and mask.shown is not None
    for read in (
        copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask)), lambda mask: mask.flatten(2),
        lambda mask: mask.transpose(1, 2).reshape(-1), lambda mask: torch.from_numpy(mask.numpy()), torch.from_dlpack,
        lambda mask: mask.share_memory_(),
    ):  # fmt: skip
        mask = cut(made(3, 12, attention_mask=padding))
        assert torch.equal(read(mask).as_subclass(torch.Tensor).reshape(whole.shape), whole)
    # Shared memory may be written to without a word.
    for share in (lambda mask: mask.numpy(), torch.from_dlpack, lambda mask: mask.share_memory_()):
        mask = cut(made(3, 12, attention_mask=padding))
        share(mask)
        assert mask.shown is None


@pytest.mark.parametrize("padding", [None, PADDED])
@pytest.mark.parametrize(
    "write", [lambda mask: mask.fill_(False), lambda mask: mask[0].fill_(False), lambda mask: mask[:, :, 1].fill_(True)]
)
def test_writing_to_a_described_mask_does_what_it_does_to_the_one_it_stands_for(write, padding):
    """Of rows that memory holds once, torch refuses to write to several at a time."""
    mask, whole = (made(3, 12, attention_mask=padding) for _ in range(2))
    whole, done = whole.whole(), []
    for x in (mask, whole):
        try:
            write(x)
            done.append(True)
        except RuntimeError as error:
            assert "single memory location" in str(error)
            done.append(False)
    assert done[0] == done[1] and torch.equal(mask.whole(), whole)


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("padding", [None, SCATTERED])
def test_compiled_code_takes_masks(padding, without_gradients):
    with without_gradients():
        for code in (lambda mask: mask & mask, lambda mask: mask[:, :, -1:], lambda mask: mask.float() * 2):
            mask = made(3, 12, attention_mask=padding, **WINDOWED)
            torch._dynamo.reset()
            found, right = torch.compile(code, backend="eager")(mask), code(mask)
            assert torch.equal(found, right) and found.dtype == right.dtype


class Sharing:
    """A configuration of layers that share the keys of others."""

    num_kv_shared_layers = 2


@pytest.mark.parametrize("window", [None, 12, 40])
def test_layers_that_get_the_last_queries_alone_get_their_mask(window, monkeypatch):
    """Of a whole text, too: that no mask is there would say nothing of which queries are left."""
    monkeypatch.setattr(masks, "original_of", lambda config: ("sdpa", True))
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    arguments = {"mask_function": function, "local_size": window}
    assert made(12, 12, config=object(), **arguments) is None
    mask = made(12, 12, config=Sharing(), **arguments)
    for m in (1, 5):
        last = mask[:, :, -m:]
        assert last.shown == Shown(window=window) and dropped_before(last, window, m, 12) == 0
    assert made(1, 1, config=Sharing(), mask_function=function) is None


@pytest.mark.parametrize("m", [1, 2, 3])
def test_the_last_queries_of_a_mask_are_described(m, monkeypatch):
    mask = made(3, 12, attention_mask=PADDED)
    with monkeypatch.context() as unmade:
        unmade.setattr(ShownMask, "whole", lambda mask: pytest.fail("a mask was made"))
        last = mask[:, :, slice(-m, None), :]
    assert isinstance(last, ShownMask) and last.shown == mask.shown and last.shape == (2, 1, m, 12)
    assert torch.equal(last & True, mask.whole()[:, :, 3 - m :])
    for other in (lambda: mask[:, :, :m][:, :, :1], lambda: mask[:, :, -3::2], lambda: mask[:1]):
        assert type(other()) is ToldMask
    for at in (0, 1):
        mask = made(3, 12, attention_mask=PADDED)
        last = mask[:, :, -m:]
        (mask, last)[at].fill_(True)
        assert mask.shown is None and last.shown is None and last.whole().all() and mask.whole()[:, :, 3 - m :].all()


def test_left_pads():
    assert left_pads(None, 0, 12) is None
    assert left_pads(PADDED, 0, 12).tolist() == [0, 5]
    assert left_pads(PADDED, 3, 9).tolist() == [0, 2]
    assert left_pads(PADDED, 6, 6) is None
    assert left_pads(PADDED.flip(1), 0, 12) is False
    assert left_pads(PADDED, 3, 12) is False
    assert left_pads(torch.zeros(1, 4), 0, 4).tolist() == [4]

"""Rows of a decode step that see some of the keys and keep as many as they say, in CUDA C++, emulated: the reference's bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from qaxis import decode
from qaxis.attention import backend
from qaxis.attention.always import NONE, Always
from qaxis.attention.logits import Logits
from qaxis.cuda import emulator
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
    step = decoder(q, k, v, index, rows=device_rows(rows), always=always, logits=logits)
    most = decoder.made_for.k_eff
    output, indices = expected(q, *whole, rows, most, always, logits or Logits(q.shape[3] ** -0.5))
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


LOGITS: dict[str, Logits] = {
    "cap": Logits(0.125, 5.0), "scale 1, little cap": Logits(1.0, 0.5), "sink": Logits(0.125, None, bell(4, seed=3) * 4),
    "both": Logits(0.3, 30.0, bell(8, seed=4)[::2].half()), "bfloat16": Logits(0.125, None, bell(4).bfloat16()),
    "float64": Logits(0.125, None, bell(1).double().expand(4)),
    "no numbers": Logits(0.125, None, torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])),
}  # fmt: skip


@pytest.mark.parametrize("name", LOGITS)
def test_soft_caps_and_sinks_have_the_bits_of_the_reference(decoder, tensors, name):
    q, k, v = tensors
    check(decoder, q, k, v, decode.index_keys(k), [(0, 700, 90), (300, 301, 1)], logits=LOGITS[name])

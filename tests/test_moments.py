"""Moments beside a cache: whatever was done to it, they are those of its complete groups, made anew."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from transformers import LlamaConfig

import qaxis
from qaxis.storage import append_quantised, moments, summary, triton_moments
from qaxis.storage.formats import FORMATS, Format
from qaxis.storage.grid import Grid
from qaxis.storage.in_place import KeyValues
from qaxis.storage.in_place_quantised import StoredKeyValues
from qaxis.storage.shared import Shared

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WAYS = ["torch", "triton"]


def states(batch: int, n: int, dim: int, dim_v: int, dtype: torch.dtype, seed: int = 0, heads: int = 1):
    """Keys and values whose sums depend on the order in which they are added."""
    g = torch.Generator().manual_seed(seed)
    k, v = (
        torch.randn(batch, heads, n, x, generator=g) * torch.exp(torch.randn(n, 1, generator=g)) for x in (dim, dim_v)
    )
    return k.to(dtype), v.to(dtype)


def anew(kv, pads):
    """Moments of all complete groups, from the numbers that are held."""
    k, v = kv.views() if isinstance(kv, KeyValues) else (side.dequantized() for side in kv.sides)
    rows = []
    for b, pad in enumerate([0] * kv.batch if pads is None else pads.tolist()):
        first, end = -(-max(0, pad) // 128), kv.length // 128
        rows.append(moments.add_groups(moments.empty(k[b], v[b]), k[b], v[b], first, end))
    return moments.Moments(*map(torch.stack, zip(*rows, strict=True)))


def launch(kv, pads):
    triton_moments.follow(kv.summary.moments, kv.summary.state, kv.clock.tensor, *kv.all_room(), pads)


def ask(kv, pads, way):
    if way == "torch":
        return kv.moments(pads)
    # As on a GPU; a launch that is repeated changes nothing.
    if kv.summary.moments is None:
        kv.summary.make(kv)
    kv.clock.move_to(kv.length)
    for _ in range(2):
        launch(kv, pads)
    return kv.summary.moments


def same(a, b):
    return all(x.dtype == torch.float32 and x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def make(kind, k, v):
    one = k[:, :, :1], v[:, :, :1]
    if kind == "full":
        return KeyValues(Shared(), *one)
    return StoredKeyValues(Shared(), *one, FORMATS[kind])


def test_they_are_the_sums_of_their_tokens():
    k, v = states(1, 300, 5, 3, torch.float32)
    kv = make("full", k, v)
    kv.append(k, v)
    products, sums = kv.moments(torch.tensor([7], dtype=torch.int32))
    x = torch.cat([v, k], -1)[:, :, 128:256].double()
    assert torch.allclose(products.double(), x.transpose(2, 3) @ k[:, :, 128:256].double(), rtol=1e-5, atol=1e-4)
    assert torch.allclose(sums.double(), x.sum(2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("dim, dim_v", [(8, 5), (70, 20), (3, 0), (1, 33)])
def test_every_width_and_dtype(dim, dim_v, dtype, way):
    k, v = states(2, 520, dim, dim_v, dtype)
    kv = make("full", k, v)
    pads = torch.tensor([0, 130], dtype=torch.int32)
    for start, end in ((0, 100), (100, 128), (128, 300), (300, 520)):
        kv.append(k[:, :, start:end], v[:, :, start:end])
        assert same(ask(kv, pads, way), anew(kv, pads))
    assert same(ask(kv, None, way), anew(kv, None))


@pytest.mark.parametrize("at_once", [1, 16, 64])
def test_however_many_tokens_the_kernel_takes_at_once(at_once, monkeypatch):
    k, v = states(1, 256, 3, 2, torch.float32)
    kv = make("full", k, v)
    kv.append(k, v)
    monkeypatch.setattr(triton_moments, "AT_ONCE", at_once)
    assert same(ask(kv, None, "triton"), anew(kv, None))


class Changes:
    """Things that happen to a cache, by chance."""

    def __init__(self, kind: str, seed: int) -> None:
        self.random = random.Random(seed)
        dtype = torch.bfloat16 if kind == "int8" else DTYPES[seed % 3]
        self.k, self.v = states(3, 4000, 6, 4, dtype, seed)
        self.kv = make(kind, self.k, self.v)
        self.taken, self.pads = 0, torch.tensor([0, 5, 300], dtype=torch.int32)
        self.kinds = ["append"] * 5 + ["crop", "order", "rows", "pads", "back"] + ["refill"] * (kind == "full")

    def states(self, m: int):
        self.taken += m
        rows = torch.arange(self.kv.batch) % 3
        return (x[rows, :, self.taken - m : self.taken] for x in (self.k, self.v))

    def change(self) -> None:
        kind, kv = self.random.choice(self.kinds), self.kv
        if kind == "append":
            kv.append(*self.states(self.random.choice([1, 60, 127, 128, self.random.randint(1, 300)])))
        elif kind == "crop":
            kv.crop(self.random.choice([kv.length // 128 * 128, self.random.randint(0, kv.length), kv.length]))
        elif kind == "pads":
            self.pads = torch.tensor([self.random.choice([0, -1, 128, 129, 400]) for _ in self.pads], dtype=torch.int32)
        elif kind == "back":
            # The same tokens come once more, and are others.
            mark = kv.shared.mark()
            kv.append(*self.states(130))
            if self.random.random() < 0.5:
                kv.moments(self.pads)
            kv.shared.rewind(mark)
            kv.shared.clock.at = -1
            kv.append(*self.states(130))
        elif kind == "refill":
            n = self.random.randint(1, max(1, kv.length))
            kv.refill(*self.states(n), n)
        else:
            self.select(kind)

    def select(self, kind: str) -> None:
        batch = self.kv.batch
        if kind == "order":
            rows = torch.tensor([self.random.randrange(batch) for _ in range(batch)])
        elif batch > 3:
            rows = torch.arange(batch) % 4 != 1
        else:
            rows = torch.arange(batch).repeat_interleave(2)
        self.kv.select(rows)
        self.pads = self.pads[rows]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["full", "int8"])
def test_whatever_happens_they_are_those_made_anew(kind, way, seed):
    changes = Changes(kind, seed)
    for i in range(20 if way == "torch" else 10):
        changes.change()
        if i % 3:
            assert same(ask(changes.kv, changes.pads.clone(), way), anew(changes.kv, changes.pads)), i


@pytest.mark.parametrize(
    "format",
    [
        FORMATS["int6"], FORMATS["int4"], FORMATS["int8"], Format(values=Grid(8, "token", 16)),
        Format(Grid(8, "channel", 64), Grid(8, "channel", 32), sinks=20),
    ],
    ids=["int6", "int4", "int8", "values by token", "smaller groups"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
def test_of_a_quantised_cache_they_are_those_of_what_it_gives_back(format, dtype):
    k, v = states(1, 400, 8, 6, dtype)
    kv = StoredKeyValues(Shared(), k[:, :, :1], v[:, :, :1], format)
    reads = format.keys.bits == 8 and dtype != torch.float16
    for start, end in ((0, 130), (130, 256), (256, 400)):
        kv.append(k[:, :, start:end], v[:, :, start:end])
        assert kv.lasting and same(ask(kv, None, "torch"), anew(kv, None))
        if reads:
            kv.summary.restart()
            assert same(ask(kv, None, "triton"), anew(kv, None))


def test_groups_that_change_when_more_of_them_are_quantised_are_added_anew():
    k, v = states(1, 600, 8, 6, torch.bfloat16)
    kv = StoredKeyValues(Shared(), k[:, :, :1], v[:, :, :1], Format(Grid(8, "channel", 256), Grid(8, "channel", 96)))
    for start, end in ((0, 200), (200, 300), (300, 600)):
        kv.append(k[:, :, start:end], v[:, :, start:end])
        assert not kv.lasting and same(kv.moments(), anew(kv, None))


@pytest.mark.parametrize("kind", ["full", "int8"])
def test_who_never_asks_pays_nothing_and_who_asks_is_told_the_bytes(kind):
    k, v = states(2, 300, 8, 6, torch.bfloat16)
    kv = make(kind, k, v)
    kv.append(k, v)
    kv.crop(200)
    kv.select(torch.tensor([1, 0]))
    kv.operands()
    before = kv.nbytes()
    assert kv.summary.moments is None and kv.summary.state is None
    found = kv.moments()
    state = kv.summary.state
    assert kv.nbytes() - before == sum(x.numel() * 4 for x in (*found, state)) and state.numel() < 100


@pytest.mark.parametrize("kind", ["full", "int8"])
def test_buffers_stay_where_they_are_and_the_version_says_when_they_do_not(kind):
    k, v = states(2, 3000, 4, 4, torch.bfloat16)
    kv = make(kind, k, v)
    kv.append(k[:, :, :300], v[:, :, :300])
    version, found = kv.shared.version, kv.moments()
    places = [x.data_ptr() for x in (*found, kv.summary.state)]
    assert kv.shared.version == version
    kv.append(k, v)
    kv.crop(400)
    kv.select(torch.tensor([1, 0]))
    kv.append(k[:, :, :300], v[:, :, :300])
    pads = torch.tensor([200, 0], dtype=torch.int32)
    assert [x.data_ptr() for x in (*kv.moments(pads), kv.summary.state)] == places
    version = kv.shared.version
    kv.select(torch.tensor([True, False]))
    assert kv.shared.version > version and same(kv.moments(pads[:1]), anew(kv, pads[:1]))


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_change_places_take_along_what_they_counted(way):
    k, v = states(2, 300, 4, 4, torch.bfloat16)
    kv, pads = make("full", k, v), torch.tensor([0, 100], dtype=torch.int32)
    kv.append(k, v)
    ask(kv, pads, way)
    kv.select(torch.tensor([1, 0]))
    # Each row is padded as the other one was.
    assert same(ask(kv, pads, way), anew(kv, pads))


def test_a_launch_follows_the_clock_alone():
    """As a replayed graph has it: the host counts afterwards; a token that comes again may be another one."""
    k, v = states(1, 300, 8, 6, torch.bfloat16)
    kv = make("int8", k, v)
    kv.append(k[:, :, :255], v[:, :, :255])
    kv.reserve(1)
    kv.operands()
    pads = torch.zeros(1, dtype=torch.int32)
    first = ask(kv, pads, "triton")[1].clone()
    mark, found = kv.shared.mark(), []
    for token in (255, 270):
        kv.shared.rewind(mark)
        kv.clock.tensor.fill_(256)
        append_quantised.append(kv, kv.clock.tensor, k[:, :, token : token + 1], v[:, :, token : token + 1])
        launch(kv, pads)
        kv.shared.advance(1)
        assert same(kv.summary.moments, anew(kv, pads))
        found.append(kv.summary.moments.sums.clone())
    assert not torch.equal(*found) and not torch.equal(first, found[0])
    # Pads are read where they lie.
    pads.fill_(1)
    launch(kv, pads)
    assert same(kv.summary.moments, anew(kv, pads))


def test_a_group_is_added_once(monkeypatch):
    k, v = states(2, 600, 4, 4, torch.float32)
    kv, added = make("full", k, v), []
    real = summary.add_groups
    monkeypatch.setattr(
        summary, "add_groups", lambda m, k, v, a, b: added.append((len(k), b - a)) or real(m, k, v, a, b)
    )
    for i in range(0, 600, 50):
        kv.append(k[:, :, i : i + 50], v[:, :, i : i + 50])
        for pads in ([0, 0], [0, 0]):
            kv.moments(torch.tensor(pads, dtype=torch.int32))
    assert added == [(2, 1)] * 4
    kv.moments(torch.tensor([0, 128], dtype=torch.int32))
    assert added[4:] == [(1, 3)]
    kv.crop(512)
    kv.moments(torch.tensor([0, 128], dtype=torch.int32))
    assert added[5:] == []


@pytest.mark.parametrize("kind", ["full", "int8"])
def test_a_copy_goes_on_by_itself_and_modes_of_torch_change_nothing(kind):
    k, v = states(1, 600, 8, 6, torch.bfloat16)
    kv = make(kind, k, v)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        kv.append(k[:, :, :200], v[:, :, :200])
        kv.moments()
    other = copy.deepcopy(kv)
    other.append(k[:, :, 400:], v[:, :, 400:])
    kv.append(k[:, :, 200:400], v[:, :, 200:400])
    assert same(kv.moments(), anew(kv, None)) and same(other.moments(), anew(other, None))
    assert not kv.moments().products.requires_grad and not torch.equal(kv.moments().sums, other.moments().sums)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        kv.append(k[:, :, 400:], v[:, :, 400:])
        kv.move("cpu")
        assert same(kv.moments(), anew(kv, None))


@pytest.mark.parametrize("made", [qaxis.Cache, qaxis.Int8Cache])
def test_they_are_not_saved_and_made_anew_from_what_is_read(made, tmp_path):
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    cache, (k, v) = made(config), states(1, 300, 8, 8, torch.bfloat16)
    cache.update(k, v, 0)
    before = cache.layers[0].kv.moments()
    bytes_before = cache.stored_bytes()
    cache.save(tmp_path / "cache")
    read = made.load(tmp_path / "cache", config)
    assert read.stored_bytes() < bytes_before and same(read.layers[0].kv.moments(), before)
    cache.crop(-100)
    cache.update(k[:, :, :60], v[:, :, :60], 0)
    assert same(cache.layers[0].kv.moments(), anew(cache.layers[0].kv, None))
    cache.reset()
    cache.update(k[:, :, :150], v[:, :, :150], 0)
    assert same(cache.layers[0].kv.moments(), anew(cache.layers[0].kv, None))


def test_what_does_not_fit_is_named():
    k, v = states(2, 130, 4, 4, torch.float32)
    windowed = KeyValues(Shared(), k[:, :, :1], v[:, :, :1], window=64)
    with pytest.raises(ValueError, match="window=64"):
        windowed.moments()
    fits = torch.zeros(2, dtype=torch.int32)
    wrong = {
        "pads=": [0, 0], "pads.shape": torch.zeros(3, dtype=torch.int32), "pads.dtype": torch.zeros(2),
        "pads.stride": torch.zeros(4, dtype=torch.int32)[::2], "pads.device": fits.to("meta"),
    }  # fmt: skip
    for kind in ("full", "int8"):
        kv = make(kind, k, v)
        for name, pads in wrong.items():
            with pytest.raises(ValueError, match=name):
                kv.moments(pads)
        assert kv.summary.moments is None


def test_while_a_graph_is_captured_no_buffers_are_made_and_the_host_is_not_waited_for(monkeypatch):
    k, v = states(1, 130, 4, 4, torch.float32)
    kv = make("full", k, v)
    kv.append(k, v)
    for message in ("before", "PyTorch"):
        with monkeypatch.context() as patch:
            patch.setattr(summary, "is_captured", lambda x: True)
            with pytest.raises(RuntimeError, match=message):
                kv.moments()
        kv.moments()

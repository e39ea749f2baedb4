"""An 8-bit cache in place: what is stored is what quantising at once gives, and the index that of ``index_cache``."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

import qaxis
from qaxis.decode import index_cache
from qaxis.storage import append_quantised
from qaxis.storage.formats import FORMATS, Format
from qaxis.storage.grid import Grid
from qaxis.storage.in_place_quantised import StoredKeyValues
from qaxis.storage.shared import Shared
from qaxis.storage.side import Side, Stored

from .test_in_place import loud, same_index

PARTS = ("codes", "scales", "first", "newest")


def fresh(k, v, format=FORMATS["int8"]):
    return StoredKeyValues(Shared(), k[:, :, :1], v[:, :, :1], format)


def append_by_triton(kv, k, v):
    """As on a GPU; a launch that is repeated changes nothing."""
    kv.operands()
    kv.reserve(1)
    kv.clock.move_to(kv.length + 1)
    for _ in range(2):
        append_quantised.append(kv, kv.clock.tensor, k, v)
    kv.advance(1)


def same_stored(a: Stored, b: Stored) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in PARTS)


def check(kv, k, v):
    for side, x in zip(kv.sides, (k, v), strict=True):
        once = Side(x, side.grid, side.sinks)
        once.prepare(x)()
        assert same_stored(side.stored(), once.stored())
    keys, values, index = kv.operands()
    if kv.quantised:
        keys.check_form("keys")
        values.check_form("values")
        index.check_form(keys)
        assert same_index(index, index_cache(kv.sides[0].stored()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=lambda x: str(x)[6:])
def test_one_token_by_triton_is_what_quantising_at_once_gives(dtype):
    k, v = loud(1, 2, 390, 32, dtype=dtype), loud(1, 2, 390, 20, dtype=dtype, seed=1)
    kv = fresh(k, v)
    assert kv.capturable and kv.quantised == (dtype != torch.float16)
    n = 0
    for m in (2, 124, 1, 1, 1, 126, 1, 130):
        if m == 1:
            append_by_triton(kv, k[:, :, n : n + 1], v[:, :, n : n + 1])
        else:
            kv.append(k[:, :, n : n + m], v[:, :, n : n + m])
        n += m
        check(kv, k[:, :, :n], v[:, :, :n])
    kv.check_finite()


def test_from_the_first_token_and_without_any_in_full():
    k, v = loud(2, 1, 10, 8, dtype=torch.bfloat16), loud(2, 1, 10, 8, dtype=torch.bfloat16, seed=1)
    for sinks in (0, 4):
        kv = fresh(k, v, Format(sinks=sinks))
        for i in range(8):
            append_by_triton(kv, k[:, :, i : i + 1], v[:, :, i : i + 1])
            check(kv, k[:, :, : i + 1], v[:, :, : i + 1])


def test_cropped_into_a_group_its_numbers_wait_again():
    k, v = loud(1, 1, 300, 8, dtype=torch.bfloat16), loud(1, 1, 300, 8, dtype=torch.bfloat16, seed=1)
    for length in (290, 256, 255, 130, 128, 3, 0):
        kv = fresh(k, v)
        kv.append(k, v)
        kv.operands()
        before = [side.dequantized() for side in kv.sides]
        kv.crop(length)
        assert kv.length == length
        if length:
            assert all(torch.equal(x[:, :, :length], s.dequantized()) for x, s in zip(before, kv.sides, strict=True))
            assert same_index(kv.operands()[2], index_cache(kv.sides[0].stored()))
        append_by_triton(kv, k[:, :, :1], v[:, :, :1])
        assert same_index(kv.operands()[2], index_cache(kv.sides[0].stored()))


def test_buffers_stay_where_they_are_unless_the_version_says_so():
    k = torch.zeros(1, 1, 2000, 8)
    kv = fresh(k, k)
    kv.append(k[:, :, :1000], k[:, :, :1000])
    kv.operands()
    seen = {kv.shared.version: kv.addresses()}
    for i in range(30):
        kv.append(k[:, :, : 1 + 13 * i], k[:, :, : 1 + 13 * i])
        assert seen.setdefault(kv.shared.version, kv.addresses()) == kv.addresses()
    assert len(seen) < 10
    version = kv.shared.version
    kv.crop(300)
    kv.select(torch.tensor([0]))
    assert kv.shared.version == version and kv.addresses() == seen[version]
    kv.select(torch.tensor([0, 0]))
    assert kv.shared.version > version and kv.batch == 2


def test_what_is_not_finite_is_noted_on_a_gpu_and_refused_on_a_cpu():
    k = torch.ones(1, 2, 3, 8)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        kv, odd = fresh(k, k), k[:, :, :1].clone()
        kv.append(k, k)
        odd[0, 1, 0, 5] = wrong
        with pytest.raises(ValueError, match="value_states"):
            kv.append(k[:, :, :1], odd)
        kv.check_finite()
        append_by_triton(kv, k[:, :, :1], odd)
        with pytest.raises(ValueError, match="finite"):
            kv.check_finite()


def test_formats_without_kernels_say_so_and_are_bounded():
    k, v = loud(1, 1, 300, 16, dtype=torch.float16), loud(1, 1, 300, 16, dtype=torch.float16, seed=1)
    for format in (FORMATS["int6"], FORMATS["int4"], Format(values=Grid(8, "token", 16)), FORMATS["int8"]):
        kv = fresh(k.clamp(-2000, 2000), v.clamp(-2000, 2000), format)
        kv.append(k.clamp(-2000, 2000), v.clamp(-2000, 2000))
        keys, values, index = kv.operands()
        assert kv.reason and not kv.quantised and kv.capturable == (format == FORMATS["int8"])
        assert keys.shape == k.shape and values.shape == v.shape and index.codes is None
        assert bool((index.norm[..., None] >= torch.linalg.vector_norm(keys.double(), dim=-1)).all())


def test_a_group_that_becomes_complete_needs_room_for_its_codes():
    """Before a token is appended by a kernel, it is asked whether anything would have to move."""
    torch.manual_seed(0)
    cache = qaxis.Int8Cache(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=64))
    cache.update(*torch.randn(2, 1, 1, 130, 64), 0)
    (layer,) = cache.shared.holders
    assert layer.has_room(131) and layer.has_room(255) and not layer.has_room(256)
    version = cache.shared.version
    for _ in range(125):
        cache.update(*torch.randn(2, 1, 1, 1, 64), 0)
    assert cache.shared.version == version and layer.length == 255
    cache.update(*torch.randn(2, 1, 1, 1, 64), 0)
    assert cache.shared.version > version

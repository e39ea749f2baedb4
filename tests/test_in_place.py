"""Keys and values in place: after every append they are what was appended, and the index is that of the keys."""

from __future__ import annotations

import pytest
import torch

from qaxis.decode import index_keys
from qaxis.decode.index import KeyIndex
from qaxis.storage import append
from qaxis.storage.in_place import KeyValues
from qaxis.storage.shared import Shared
from qaxis.storage.window import first_held, places_for

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def loud(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Numbers of many sizes by channel, zeros, an outlier, and tokens that are tiny or near the largest number."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.exp(3 * torch.randn(shape[-1], generator=g))
    x[..., 0] = 0.0
    x[..., 5, 1] = 3e4
    x[..., 6, :] = 1e-41
    x[:, :1, 7:9] = 0.0
    x[:, -1:, 9::200] *= 1e-30
    x[:, -1:, 133:134, 2] = torch.finfo(dtype).max * 0.99
    return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


def reserve(cache, m):
    """Make room for ``m`` more tokens in every layer."""
    for holder in cache.shared.holders:
        holder.reserve(m)


def same_index(a: KeyIndex, b: KeyIndex) -> bool:
    names = ("norm", "residual", "largest_scales")
    equal = all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)
    if a.codes is None or b.codes is None:
        return equal and a.codes is b.codes
    parts = ("codes", "scales", "first", "newest")
    if a.scaled_residuals is None or b.scaled_residuals is None:
        equal &= a.scaled_residuals is b.scaled_residuals
    else:
        equal &= torch.equal(a.scaled_residuals, b.scaled_residuals)
    return equal and all(torch.equal(getattr(a.codes, name), getattr(b.codes, name)) for name in parts)


def append_to_window_by_triton(kv: KeyValues, k: torch.Tensor, v: torch.Tensor) -> None:
    for i in range(k.shape[2]):
        kv.clock.move_to(kv.length + 1)
        for _ in range(2):
            append.append(kv.parts, kv.clock.tensor, k[:, :, i : i + 1], v[:, :, i : i + 1], kv.window)
        kv.advance(1)


def fresh(k: torch.Tensor, v: torch.Tensor, index: str, **options: int) -> KeyValues:
    return KeyValues(Shared(), k[:, :, :1], v[:, :, :1], index=index, **options)


def append_by_triton(kv: KeyValues, k: torch.Tensor, v: torch.Tensor) -> None:
    """As on a GPU; a launch that is repeated changes nothing."""
    kv.reserve(k.shape[2])
    kv.clock.move_to(kv.length + k.shape[2])
    append.append(kv.parts, kv.clock.tensor, k, v)
    once = {name: x.clone() for name, x in kv.parts.items()}
    append.append(kv.parts, kv.clock.tensor, k, v)
    assert all(torch.allclose(x, once[name], rtol=0, atol=0, equal_nan=True) for name, x in kv.parts.items())
    kv.length += k.shape[2]
    kv.indexed = kv.length


def check(kv: KeyValues, k: torch.Tensor, v: torch.Tensor) -> None:
    keys, values, index = kv.operands()
    assert torch.equal(keys, k) and torch.equal(values, v)
    index.check_form(keys)
    assert same_index(index, index_keys(k, codes=index.codes is not None))
    if index.codes is not None:
        assert index.codes.newest.data_ptr() == keys[:, :, index.codes.codes.shape[2] :].data_ptr()


@pytest.mark.parametrize("index", ["codes", "bounds"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
def test_the_index_grows_to_what_one_made_anew_is(dtype, index):
    k, v = loud(1, 2, 520, 64, dtype=dtype), loud(1, 2, 520, 24, dtype=dtype, seed=1)
    torch_, triton_ = fresh(k, v, index), fresh(k, v, index)
    n = 0
    for m in (1, 3, 123, 1, 1, 127, 1, 130, 129, 3):
        parts = k[:, :, n : n + m], v[:, :, n : n + m]
        torch_.append(*parts)
        append_by_triton(triton_, *parts)
        n += m
        for kv in (torch_, triton_):
            check(kv, k[:, :, :n], v[:, :, :n])
    assert all(torch.equal(x, triton_.parts[name]) for name, x in torch_.parts.items())


@pytest.mark.parametrize("dim, dim_v", [(80, 0), (128, 128), (20, 33), (3, 300)])
def test_every_width_and_layout(dim, dim_v):
    """As a model hands them over: heads and tokens change places, channels may be apart."""
    k = loud(2, 2, 140, dim, dtype=torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2)
    v = loud(2, 2, 140, 2 * dim_v + 3, dtype=torch.bfloat16)[..., 1 : 1 + 2 * dim_v : 2]
    for index in ("codes", "bounds"):
        torch_, triton_ = fresh(k, v, index), fresh(k, v, index)
        for start, end in ((0, 126), (126, 127), (127, 128), (128, 140)):
            parts = k[:, :, start:end], v[:, :, start:end]
            torch_.append(*parts)
            append_by_triton(triton_, *parts)
            check(torch_, k[:, :, :end], v[:, :, :end])
        assert all(torch.equal(x, triton_.parts[name]) for name, x in torch_.parts.items())


def test_room_grows_by_blocks_and_a_first_fit_is_exact():
    k = torch.zeros(1, 1, 20000, 4)
    kv = fresh(k, k, "codes")
    kv.append(k[:, :, :15000], k[:, :, :15000])
    assert kv.room == 15360 and kv.shared.version == 2
    rooms = set()
    for _ in range(40):
        kv.append(k[:, :, :100], k[:, :, :100])
        rooms.add(kv.room)
    assert rooms == {15360, 16384, 17408, 18944, 20480} and kv.shared.version == 6
    kv.reserve(50000)
    assert kv.room == 69120
    place, version = kv.parts["k"].data_ptr(), kv.shared.version
    for _ in range(3):
        kv.append(k, k)
        kv.crop(0)
    assert kv.parts["k"].data_ptr() == place and kv.shared.version == version
    assert fresh(k, k, "bounds", room=1000).room == 0


def test_what_is_not_a_number_gives_no_bound_that_is_too_small():
    k = loud(1, 2, 128, 16)
    k[0, 0, 3, 4], k[0, 1, 3, 4] = torch.nan, torch.inf
    for function in (KeyValues.append, append_by_triton):
        kv = fresh(k, k, "codes")
        function(kv, k, k)
        kv.operands()
        assert torch.equal(kv.parts["norm"], torch.full((1, 2), torch.inf))


def test_states_that_do_not_fit_are_named():
    k, v = torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 4)
    kv = fresh(k, v, "codes")
    wrong = {
        "k.dtype": (k.half(), v), "v.dtype": (k, v.half()), "k.shape": (k[:1], v), "v.shape": (k, v[:, :, :3]),
        "k.device": (k.to("meta"), v), "k=": (None, v), "v=": (k, None),
    }  # fmt: skip
    for name, states in wrong.items():
        with pytest.raises(ValueError, match=name):
            kv.check(*states)
    kv.check(k, v)
    for options, name in (({"index": "words"}, "index"), ({"index": "codes", "window": 8}, "index")):
        with pytest.raises(ValueError, match=name):
            fresh(k, v, **options)


@pytest.mark.parametrize("window", [1, 2, 100, 257])
def test_a_window_keeps_its_newest_tokens_where_the_clock_says(window):
    """Token by token and many at a time; from one place of the buffer to the next turn."""
    k, v = loud(1, 1, 1300, 8), loud(1, 1, 1300, 5, seed=1)
    kv = fresh(k, v, "bounds", window=window)
    triton_, n = fresh(k, v, "bounds", window=window), 0
    for m in (1, window, 300, kv.room, 1, 2, 130, 1):
        m = min(m, k.shape[2] - n)
        kv.append(k[:, :, n : n + m], v[:, :, n : n + m])
        n += m
        first = first_held(n, window, kv.room)
        assert kv.held == n - first >= min(n, window) and kv.room == places_for(window)
        check(kv, k[:, :, first:n], v[:, :, first:n])
    # The launch takes one token: from a little before the buffer is full to a little after.
    for start in (0, kv.room - 1, 2 * kv.room - window):
        triton_.refill(k[:, :, :start], v[:, :, :start], start)
        triton_.operands()
        append_to_window_by_triton(triton_, k[:, :, start : start + 2], v[:, :, start : start + 2])
        first = first_held(start + 2, window, kv.room)
        check(triton_, k[:, :, first : start + 2], v[:, :, first : start + 2])

"""The quantised cache as transformers uses it, its storage, and bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Gemma3TextConfig, GenerationConfig, LlamaConfig, MistralConfig

import figures.formats
import figures.memory
import qaxis
from qaxis.attention.logits import Logits
from qaxis.storage.buffer import Growing
from qaxis.storage.formats import FORMATS, Format
from qaxis.storage.grid import Grid, dequantize, pack, quantize, scale_of, unpack
from selfcheck.checks import formats

GRIDS = [Grid(b, per, 128 if per == "channel" else 64, zero) for b in range(2, 9) for per in ("channel", "token")
         for zero in ((False, True) if b < 8 else (False,))]  # fmt: skip


def states(n, dtype=torch.float32, seed=0, dim=64, batch=1):
    return tuple(torch.randn(2, batch, 2, n, dim, generator=torch.Generator().manual_seed(seed)).to(dtype))


def hard(shape, seed):
    """Numbers of many sizes, channels with an offset, outliers, constants and zeros."""
    g = torch.Generator().manual_seed(seed)
    last = (*shape[:-2], 1, shape[-1])
    x = torch.randn(shape, generator=g) * torch.exp(2 * torch.randn(last, generator=g))
    x = x + torch.randn(last, generator=g) * torch.exp(2 * torch.randn(last, generator=g))
    x[..., 0], x[..., 1], x[..., 2], x[..., 3] = 0.0, 7.0, x[..., 2].abs(), -300 + 1e-3 * x[..., 3]
    return x.clamp(-2000, 2000)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.bits}-{g.per}{'-zero' if g.zero else ''}")
def test_what_is_dequantised_is_exact_in_bfloat16_and_near(grid):
    for seed in range(20):
        x = hard((2, 2, 128, 64), seed)
        dim = 2 if grid.per == "channel" else 3
        codes, scales, zeros = quantize(x, dim, grid)
        back = dequantize(codes, scales, zeros, grid, torch.float32)
        assert torch.equal(back, back.bfloat16().float())
        # No code is clipped: half a step, and a little for the rounding of the quotient.
        assert float(((back - x).abs() / scale_of(scales, grid.bits)).max()) <= 0.5 + 1e-4
        if grid.bits < 8:
            assert int(codes.max()) < 2**grid.bits
            assert torch.equal(unpack(pack(codes, grid.bits), grid.bits), codes)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_and_bytes(name, dtype):
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    cache = qaxis.Int8Cache(config, format=name)
    k, v = states(1024, dtype)
    for layer in range(2):
        stored = cache.update(k, v, layer)
        again = cache.layers[layer].dequantized()
        for original, got, other in zip((k, v), stored, again, strict=True):
            first = FORMATS[name].sinks
            assert got.dtype == dtype and torch.equal(got, other)
            assert torch.equal(got[:, :, :first], original[:, :, :first])
            assert torch.equal(got[:, :, first:], got[:, :, first:].bfloat16().to(dtype))
            assert not torch.equal(got, original)
            assert float((got - original).abs().max()) < {"int8": 0.04, "int6": 0.2, "int4": 0.5}[name]
    head = 2 * 2 * FORMATS[name].sinks * 2 * 64 * k.element_size()
    sides = sum(side.nbytes() for layer in cache.layers for side in layer.kv.sides)
    ratio = (sides - head) / (2 * 2 * 2 * k.numel())
    # Beside them lies what the index of the keys needs.
    assert 0 < cache.stored_bytes() - sides < 0.0025 * (2 * 2 * 2 * k.numel())
    assert ratio == pytest.approx({"int8": 0.50390625, "int6": 0.3828125, "int4": 0.2890625}[name])


def test_every_list_of_formats_has_every_format():
    assert set(FORMATS) == set(formats.TARGETS) == set(figures.formats.OWN) == {*figures.memory.CACHES} - {"bfloat16"}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_however_it_is_fed_it_stores_the_same(llama, name, dtype):
    k, v = states(300, dtype)
    one, many = (qaxis.Int8Cache(llama.config, format=name) for _ in range(2))
    whole = one.update(k, v, 0)
    for start, stop in ((0, 1), (1, 130), (130, 131), (131, 255), (255, 256), (256, 300)):
        parts = many.update(k[:, :, start:stop], v[:, :, start:stop], 0)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True)) and many.get_seq_length() == 300
    many.crop(-50)
    cropped = many.layers[0].dequantized()
    assert torch.equal(cropped[1], whole[1][:, :, :250]) and torch.equal(cropped[0][:, :, :128], whole[0][:, :, :128])
    many.crop(-250)
    assert many.get_seq_length() == 0
    k, v = states(300, dtype, seed=7)
    fresh = qaxis.Int8Cache(llama.config, format=name).update(k, v, 0)
    assert all(torch.equal(a, b) for a, b in zip(fresh, many.update(k, v, 0), strict=True))
    many.reset()
    assert many.get_seq_length() == 0 and many.stored_bytes() == 0


def test_cropping_into_a_group_keeps_its_values(llama):
    cache = qaxis.Int8Cache(llama.config)
    k, v = states(256)
    before = [x.clone() for x in cache.update(k, v, 0)]
    cache.crop(-100)
    after = cache.layers[0].dequantized()
    assert all(torch.equal(a[:, :, :156], b) for a, b in zip(before, after, strict=True))
    assert cache.layers[0].sides[0].parts["newest"].length == 28
    for wrong in (5, -1000):
        with pytest.raises(ValueError, match="tokens_to_remove"):
            cache.layers[0].crop(wrong)


@pytest.mark.parametrize("name", FORMATS)
def test_first_tokens_stay_in_full_and_spoil_no_scale(llama, name):
    k, v = states(128)
    loud = [x.clone() for x in (k, v)]
    for x in loud:
        x[:, :, :4] *= 100
    four = replace(FORMATS[name], sinks=4)
    quiet_out = qaxis.Int8Cache(llama.config, format=four).update(k, v, 0)
    loud_out = qaxis.Int8Cache(llama.config, format=four).update(*loud, 0)
    for quiet, out, given in zip(quiet_out, loud_out, loud, strict=True):
        assert torch.equal(out[:, :, :4], given[:, :, :4]) and torch.equal(out[:, :, 4:], quiet[:, :, 4:])
    none = qaxis.Int8Cache(llama.config, format=replace(four, sinks=0)).update(*loud, 0)
    assert not torch.equal(none[0][:, :, 4:], loud_out[0][:, :, 4:])
    with pytest.raises(ValueError, match="sinks"):
        Format(sinks=129)


def test_appending_moves_what_is_stored_rarely():
    like = torch.zeros(1, 1, 1, 4, dtype=torch.int8)
    growing, moves = Growing(like), 0
    growing.append(like.expand(-1, -1, 1000, -1))
    assert growing.buffer.shape[2] == 1000
    for _ in range(4000):
        before = growing.buffer.data_ptr()
        growing.append(like)
        moves += growing.buffer.data_ptr() != before
    assert growing.length == 5000 and moves < 40 and growing.buffer.shape[2] < 5000 * 17 / 16


def test_generate_with_beams_batches_and_every_format(llama):
    ids = torch.randint(0, 97, (2, 140), generator=torch.Generator().manual_seed(1))
    plain = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    stock = llama.generate(ids, **plain)
    for name in FORMATS:
        for more in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
            some = ids[:1] if "prompt_lookup_num_tokens" in more else ids
            out = llama.generate(some, **plain, **more, past_key_values=qaxis.Int8Cache(llama.config, format=name))
            assert out.shape == (len(some), 146)
    fixed = qaxis.Int8Cache(llama.config, room=256)
    assert torch.equal(llama.generate(ids, **plain, past_key_values=fixed),
                       llama.generate(ids, **plain, past_key_values=qaxis.Int8Cache(llama.config)))  # fmt: skip
    assert stock.shape == (2, 146) and isinstance(llama.generation_config, GenerationConfig)


def test_streaming_protocol_is_what_token_by_token_gives(llama):
    from selfcheck.rivals.schemes import of_format
    from selfcheck.rivals.streaming import streaming

    ids = torch.randint(0, 97, (1, 300), generator=torch.Generator().manual_seed(2))
    for name, form in FORMATS.items():
        cache = qaxis.Int8Cache(llama.config, format=name)
        with torch.inference_mode():
            steps = torch.cat([llama(ids[:, i : i + 1], past_key_values=cache).logits for i in range(300)], 1)
            with streaming(llama, of_format(form, 16)):
                once = llama(ids, use_cache=False).logits
            dense = llama(ids).logits
        assert torch.allclose(steps, once, atol=2e-5), name
        assert float((dense - once).abs().max()) > 1e-4
    assert llama.config._attn_implementation == "sdpa"


def test_layers_with_a_window_keep_it_in_full():
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(1))
    small = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 24, "pad_token_id": 0,
    }  # fmt: skip
    for config in (
        MistralConfig(**small),
        Gemma3TextConfig(**small, layer_types=["sliding_attention", "full_attention"]),
    ):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config).eval()
        cache = qaxis.Int8Cache(config)
        out = model.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=cache)
        assert out.shape == (1, 44) and cache.stored_bytes() > 0
    with pytest.raises(ValueError, match="layer_types"):
        qaxis.Int8Cache(LlamaConfig(layer_types=["chunked_attention"], num_hidden_layers=1))


def test_bad_states_are_refused_and_the_cache_is_unchanged(llama):
    cache = qaxis.Int8Cache(llama.config)
    k, v = states(200)
    before = [x.clone() for x in cache.update(k, v, 0)]
    nan, inf = k.clone(), v.clone()
    nan[0, 0, 3, 5], inf[0, 1, 2, 0] = torch.nan, torch.inf
    bad = ((nan, v), (k, inf), (k.half(), v.half()), (k[:, :1], v[:, :1]), (k[..., :32], v), (k[:, :, :5], v))
    for keys, values in bad:
        with pytest.raises(ValueError, match=r"(key|value)_states"):
            cache.update(keys, values, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.layers[0].dequantized(), strict=True))
    for options, name in (({"format": "int3"}, "format"), ({"room": -1}, "room"), ({"format": 8}, "format")):
        with pytest.raises(ValueError, match=name):
            qaxis.Int8Cache(llama.config, **options)
    for options, name in (({"bits": 9}, "bits"), ({"per": "head"}, "per"), ({"bits": 8, "zero": True}, "zero")):
        with pytest.raises(ValueError, match=name):
            Grid(**options)
    with pytest.raises(ValueError, match="keys"):
        Format(8)


def test_too_large_for_a_small_format_is_refused_unchanged(llama):
    cache = qaxis.Int8Cache(llama.config, format="int4")
    k, v = states(100)
    cache.update(k, v, 0)
    with pytest.raises(ValueError, match=r"max\|x\|=1e\+30"):
        cache.update(torch.full_like(k, 1e30), v, 0)
    assert cache.get_seq_length() == 100


def test_extremes_and_odd_head_dims(llama):
    for dim in (64, 80, 96, 50):
        config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=dim)
        for name in FORMATS:
            k, v = states(128, dim=dim)
            k[..., 0], k[..., 1], v[:, :, 0] = 1e30 if name == "int8" else 1e4, 0.0, 0.0
            keys, values = qaxis.Int8Cache(config, format=name).update(k, v, 0)
            assert keys.shape == k.shape and torch.isfinite(keys).all()
            assert float(keys[..., 1].abs().max()) < 1e-5 and torch.allclose(keys[..., 0], k[..., 0], rtol=0.02)
            assert torch.isfinite(values).all()


@pytest.mark.parametrize("name", FORMATS)
def test_save_and_load(llama, name, tmp_path):
    cache, path = qaxis.Int8Cache(llama.config, format=name), tmp_path / "cache.safetensors"
    k, v = states(200, torch.bfloat16)
    for layer in range(2):
        cache.update(k, v, layer)
    cache.save(path)
    loaded = qaxis.Int8Cache.load(path, llama.config)
    assert loaded.format == cache.format and loaded.get_seq_length() == 200
    for a, b in zip(cache.update(k, v, 1), loaded.update(k, v, 1), strict=True):
        assert torch.equal(a, b)
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], b"", b"not a cache"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"path=.*cache.safetensors"):
            qaxis.Int8Cache.load(path, llama.config)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="layers"):
        qaxis.Int8Cache.load(path, LlamaConfig(num_hidden_layers=3))
    with pytest.raises(FileNotFoundError):
        qaxis.Int8Cache.load(tmp_path / "absent", llama.config)
    with pytest.raises(ValueError, match="empty"):
        qaxis.Int8Cache(llama.config).save(path)
    assert path.read_bytes() == data and [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]


@pytest.mark.parametrize("values", [Grid(8, "token", 64), Grid(8, "channel", 128)], ids=["per-token", "per-channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_read_the_codes_and_give_the_bits_of_the_dequantised_cache(values, dtype):
    from qaxis.attention import triton as kernels
    from qaxis.attention.selection import causal_mask
    from qaxis.storage import triton as storage
    from qaxis.storage.side import Side

    g = torch.Generator().manual_seed(0)
    for dim, n, sinks in ((32, 1, 4), (64, 100, 4), (80, 128, 0), (64, 300, 4), (128, 517, 4), (96, 259, 0)):
        m = min(3, n)
        batch = 2 if n <= 128 else 1  # The interpreter takes its time.
        q = torch.randn(batch, 4, m, dim, generator=g).to(dtype)
        k, v = (torch.randn(2, batch, 2, n, dim, generator=g) * 3).to(dtype)
        sides = Side(k, Grid(8), sinks), Side(v, values, sinks)
        for start in range(0, n, 97):
            for side, x in zip(sides, (k, v), strict=True):
                side.prepare(x[:, :, start : start + 97])()
        keys, vals = (side.stored() for side in sides)
        plain_k, plain_v = keys.dequantized(), vals.dequantized()
        assert storage.readable(keys, vals) and keys.shape == plain_k.shape
        assert torch.equal(storage.dequantized(keys), plain_k)
        assert torch.equal(storage.dequantized(vals), plain_v)
        assert torch.equal(kernels.scores(q, keys), kernels.scores(q, plain_k))
        allowed = causal_mask(m, n, "cpu")
        k_eff = qaxis.Budget(0.2, 10).of(allowed)
        indices = kernels.choose(q, keys, allowed, k_eff)
        assert torch.equal(indices, kernels.choose(q, plain_k, allowed, k_eff))
        out = kernels.attend(q, keys, vals, indices, Logits(dim**-0.5))
        assert torch.equal(out, kernels.attend(q, plain_k, plain_v, indices, Logits(dim**-0.5)))


def test_the_model_reads_the_codes_without_a_dequantised_copy(llama, monkeypatch):
    from qaxis.storage import side

    ids = torch.randint(0, 97, (1, 140), generator=torch.Generator().manual_seed(1))
    plain = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    copies = []
    honest = side.Stored.dequantized
    monkeypatch.setattr(side.Stored, "dequantized", lambda self: copies.append(1) or honest(self))

    def holding(tokens):
        # The stock model fills the cache: the interpreter takes minutes to read a prompt.
        cache = qaxis.Int8Cache(llama.config)
        with torch.inference_mode():
            llama(ids[:, :tokens], past_key_values=cache)
        return cache

    generated, chunks = [], []
    for backend in ("reference", "triton"):
        generating, reading = holding(139), holding(126)
        copies.clear()
        with torch.inference_mode(), qaxis.sparse(llama, qaxis.Budget(0.2, 9), backend=backend):
            generated.append(llama.generate(ids, past_key_values=generating, **plain))
            # A chunk that completes a group of 128 tokens.
            chunks.append(llama(ids[:, 126:131], past_key_values=reading).logits)
        assert bool(copies) == (backend == "reference")
    assert torch.equal(*generated) and torch.equal(*chunks)

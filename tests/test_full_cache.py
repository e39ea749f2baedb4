"""The cache in place wherever transformers takes one: every token is that of ``DynamicCache``."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

import qaxis
from qaxis.decode import index_keys
from qaxis.models.in_place import InPlaceLayer

from .test_cache_situations import (
    CHANGES,
    DECODERS,
    GENERATIONS,
    GREEDY,
    LOCAL,
    SMALL,
    STATEFUL,
    build,
    fill,
    looked_at,
    plain,
    prompt,
)
from .test_in_place import reserve, same_index

#: their layers hold more than keys and values
HOLD_MORE = ("Falcon-H1", "Zamba 2", "DeepSeek V3.2")


def ours(model: Any, **options: Any) -> qaxis.Cache:
    return qaxis.Cache(model.config, **options)


def check_indices(cache: qaxis.Cache) -> None:
    for layer in cache.layers:
        if isinstance(layer, InPlaceLayer) and layer.get_seq_length():
            keys, _, index = layer.kv.operands()
            assert same_index(index, index_keys(keys, codes=index.codes is not None))


def turns(cache, model, ids, parts):
    """Logits of several turns, with tokens taken back between them."""
    out, n = [], 0
    cache.activate_past_recording()
    for part, back in parts:
        out += [model(ids[:, n : n + part], past_key_values=cache).logits]
        cache.crop(-back)
        n += part - back
        assert cache.get_seq_length() == n
    return torch.cat(out, 1)


TURNS = {
    "short": [(40, 3), (1, 0), (5, 4), (1, 1), (30, 30), (2, 0)],
    "long": [(8, 2), (10, 4), (20, 19), (1, 0), (60, 50), (300, 3), (1, 0)],
}


@pytest.mark.parametrize("parts", TURNS.values(), ids=TURNS)
@torch.no_grad()
def test_turns_that_are_taken_back(parts):
    """Of a window of 24 tokens: shorter and longer prompts, taken back over its edge and over that of its buffer."""
    model, ids = build("Gemma 3", "eager"), prompt(400)
    cache = ours(model)
    assert torch.equal(turns(plain(model), model, ids, parts), turns(cache, model, ids, parts))
    check_indices(cache)
    for layer in cache.layers:
        layer.record_past = False
    model(ids[:, :3], past_key_values=cache)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.layers[0].crop(-1)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_logits_of_every_kind_of_cache(name):
    model, ids = build(name), prompt(batch=2)
    cache = ours(model)
    kinds = (DynamicLayer,) if name == "Llama 4" else (DynamicLayer, DynamicSlidingWindowLayer)
    wanted = [type(layer) in kinds for layer in plain(model).layers]
    assert [isinstance(layer, InPlaceLayer) for layer in cache.layers] == wanted
    assert len(cache) == len(plain(model)) and not cache.is_compileable

    def run(cache):
        parts = [model(ids[:, :30], past_key_values=cache, use_cache=True).logits]
        return torch.cat([*parts, *(model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40))], 1)

    assert torch.equal(run(plain(model)), run(cache))
    check_indices(cache)


@pytest.mark.parametrize("name, implementation", [("Llama", "sdpa"), ("Gemma 3", "eager"), ("Mistral", "sdpa")])
@pytest.mark.parametrize("way", GENERATIONS)
def test_generate(name, implementation, way):
    model, options = build(name, implementation), {**GREEDY, **GENERATIONS[way]}
    if way == "assisted":
        options["assistant_model"] = build("Llama", seed=5)
    cache = ours(model)
    tokens = [model.generate(**options, past_key_values=c) for c in (plain(model), cache)]
    assert torch.equal(*tokens)
    check_indices(cache)


@torch.no_grad()
def test_several_turns_copies_and_files(tmp_path):
    """Growth, over groups of 128 tokens, in and out of inference mode."""
    model, ids = build("Llama", "sdpa"), prompt(700)

    def run(cache):
        with torch.inference_mode():
            model(ids[:, :500], past_key_values=cache)
            cache.reorder_cache(torch.tensor([0]))
        cache.crop(-2)
        copies = [cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        if isinstance(cache, qaxis.Cache):
            cache.save(tmp_path / "cache")
            copies.append(qaxis.Cache.load(tmp_path / "cache", model.config))
        out = [torch.cat([model(x, past_key_values=c).logits for x in ids[:, 498:].split((100, 1, 101), 1)], 1)
               for c in copies]  # fmt: skip
        if isinstance(cache, qaxis.Cache):
            for each in copies:
                check_indices(each)
        assert all(torch.equal(out[0], x) for x in out[1:])
        return out[0]

    cache = ours(model)
    assert torch.equal(run(plain(model)), run(cache)) and cache.layers[0].kv.room > 512


def test_encoder_decoder():
    model = build("BART", "eager")
    for options in (GREEDY, {**GREEDY, "num_beams": 3}):
        caches = [EncoderDecoderCache(make(model), make(model)) for make in (plain, ours)]
        assert torch.equal(*(model.generate(prompt(batch=2), **options, past_key_values=c) for c in caches))


@pytest.mark.parametrize("name", ["Llama", "Gemma 3"])
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@torch.no_grad()
def test_with_qaxis_on(name, implementation):
    model = build(name, implementation)
    with qaxis.sparse(model, qaxis.Budget(0.2, 5)):
        tokens = [model.generate(prompt(), **GREEDY, past_key_values=c) for c in (plain(model), ours(model))]
    assert torch.equal(*tokens)


@torch.no_grad()
def test_a_compiled_forward():
    model, ids = build("Llama", "sdpa"), prompt()
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend="eager")

    def run(forward):
        cache = ours(model)
        return torch.cat([forward(part, past_key_values=cache).logits for part in ids.split((38, 1, 1), 1)], 1)

    assert torch.equal(run(step), run(model))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_what_transformers_asks_and_changes(change, kind):
    config = tf.LlamaConfig(**SMALL) if kind == "full" else tf.Gemma3TextConfig(**SMALL, **LOCAL)
    answers = []
    for cache in (DynamicCache(config=config), qaxis.Cache(config)):
        empty = looked_at(cache)
        CHANGES[change](fill(cache, n=20, dim=24, value_dim=24))
        answers.append([empty, looked_at(cache)[: 10 if change == "crop all" else None]])
    assert answers[0] == answers[1]
    check_indices(cache)
    if kind == "full":
        cache.reset()
        assert looked_at(cache) == empty and cache.stored_bytes() == 0
        assert looked_at(fill(cache)) == looked_at(fill(qaxis.Cache(config)))


def test_buffers_stay_where_they_are_unless_the_version_says_so():
    cache = fill(qaxis.Cache(tf.LlamaConfig(**SMALL), room=300))

    def places():
        return [x.data_ptr() for layer in cache.layers for x in layer.kv.parts.values()]

    before, version = places(), cache.shared.version
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    cache.crop(-7)
    reserve(cache, 489)
    for layer in (0, 1):
        cache.update(torch.ones(3, 2, 1, 8), torch.ones(3, 2, 1, 8), layer)
    assert places() == before and cache.shared.version == version and int(cache.shared.clock.tensor) == 24
    for change in (lambda: reserve(cache, 490), lambda: cache.batch_select_indices(torch.tensor([1])), cache.reset):
        change()
        assert cache.shared.version > version
        version = cache.shared.version
    assert cache.shared.holders == []


def test_work_space_of_rooms_that_no_layer_has_is_dropped(llama):
    """Of a cache that grows turn by turn; what is outside of any room, and what is still in use, stays."""
    cache = qaxis.Cache(llama.config)
    space = cache.shared.workspace
    space["capture"] = None
    rooms = []
    with torch.inference_mode():
        for n in (500, 1, 40, 1):
            if n == 1:
                with qaxis.sparse(llama, qaxis.Budget(0.2, 5), backend="triton"):
                    llama(prompt(1), past_key_values=cache)
            else:
                llama(prompt(n), past_key_values=cache)
            now = {holder.room for holder in cache.shared.holders}
            found = {key[0] for key in space if isinstance(key, tuple)}
            assert "capture" in space and found <= now and (n > 1 or found == now)
            rooms += [now]
    assert rooms[1] != rooms[2] == rooms[3]
    made = list(space.values())
    cache.shared.holders[0].reserve(4000)
    # The other layers have the room yet.
    assert list(space.values()) == made
    cache.reset()
    assert set(space) <= {"capture", "shown"} and cache.shared.holders == []


def test_tokens_that_a_replay_appended_are_counted():
    cache = fill(qaxis.Cache(tf.LlamaConfig(**SMALL)))
    mark = cache.shared.mark()
    cache.shared.advance(2)
    assert cache.get_seq_length() == cache.get_seq_length(1) == cache.shared.clock.at == 32
    cache.shared.rewind(mark)
    assert cache.get_seq_length() == cache.shared.clock.at == 30


def test_why_a_step_cannot_be_captured_is_said():
    config = tf.LlamaConfig(**SMALL)
    cache = qaxis.Cache(config)
    assert "layer 0" in cache.not_capturable() and "empty" in cache.not_capturable()
    cache.update(torch.ones(3, 2, 5, 8), torch.ones(3, 2, 5, 8), 0)
    assert "layer 1" in cache.not_capturable() and "empty" in cache.not_capturable()
    cache.update(torch.ones(3, 2, 4, 8), torch.ones(3, 2, 4, 8), 1)
    assert "lengths" in cache.not_capturable()
    cache.update(torch.ones(3, 2, 1, 8), torch.ones(3, 2, 1, 8), 1)
    assert cache.not_capturable() == ""
    cache.layers[1].kv.move("meta")
    assert "devices" in cache.not_capturable()
    cache.offloading = True
    assert "offloaded" in cache.not_capturable()
    assert "not in place" in qaxis.Cache(build("LFM2").config).not_capturable()
    for format, dtype, why in (
        ("int8", torch.float32, ""),
        ("int4", torch.float32, "PyTorch"),
        ("int8", torch.bfloat16, ""),
        ("int8", torch.float16, "dequantised"),
    ):
        small = fill(qaxis.Int8Cache(config, format=format), dtype=dtype)
        assert why in small.not_capturable() and bool(small.not_capturable()) == bool(why)
    assert "more than keys" in qaxis.Int8Cache(build("Falcon-H1").config).not_capturable()


def test_what_is_returned_says_what_holds_it_and_why_there_are_no_codes():
    for dim, kind, reason in ((8, "bounds", "8 numbers"), (64, "codes", "")):
        cache = fill(qaxis.Cache(tf.LlamaConfig(**SMALL)), dim=dim)
        keys, values = cache.update(torch.ones(3, 2, 1, dim), torch.ones(3, 2, 1, 8), 0)
        kv = keys.qaxis_key_values
        assert kv is values.qaxis_key_values is cache.layers[0].kv and ("codes" in kv.parts) == (kind == "codes")
        assert reason in kv.reason and kv.reason == cache.layers[0].index_reason and bool(kv.reason) == bool(reason)
        assert keys.data_ptr() == kv.operands()[0].data_ptr() and not kv.quantised
    assert fill(qaxis.Cache(tf.LlamaConfig(**SMALL), index="bounds")).layers[0].index_reason == ""


def test_update_names_what_does_not_fit_and_changes_nothing():
    k, v = torch.randn(2, 2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    meta = v.to("meta")
    wrong = {
        "value_states.dtype": (k, v.half()), "key_states.dtype": (k.bfloat16(), v), "value_states.device": (k, meta),
        "key_states.device": (meta, meta), "key_states.shape": (k[:1], v[:1]), "value_states.shape": (k, v[:1]),
        "value_states": (k, None), "key_states": (k.double(), v), "layer_idx": None,
    }  # fmt: skip
    for name, states in wrong.items():
        cache = fill(qaxis.Cache(tf.LlamaConfig(**SMALL)), batch=2)
        before = looked_at(cache)
        with pytest.raises(ValueError, match=name):
            cache.update(*(states or (k, v)), 0 if states else 2)
        assert looked_at(cache) == before
        if states:
            empty = qaxis.Cache(tf.LlamaConfig(**SMALL))
            with pytest.raises(ValueError, match="_states"):
                empty.update(k.double(), v, 0)
            assert not empty.is_initialized and empty.get_seq_length() == 0
    for amount in (5, -31):
        with pytest.raises(ValueError, match="tokens_to_remove"):
            cache.crop(amount)


def test_wrong_arguments_and_files_are_named(tmp_path):
    config = tf.LlamaConfig(**SMALL)
    for name, options in (("index", {"index": "words"}), ("room", {"room": -1}), ("config", {})):
        with pytest.raises(ValueError, match=name):
            qaxis.Cache(config if options else None, **options)
    path = tmp_path / "cache"
    for written, reads in ((qaxis.Cache, qaxis.Int8Cache), (qaxis.Int8Cache, qaxis.Cache)):
        fill(written(config)).save(path)
        written.load(path, config)
        with pytest.raises(ValueError, match="path="):
            reads.load(path, config)
    for name in (*STATEFUL, "DeepSeek V3.2"):
        if name in HOLD_MORE:
            model = build(name)
            cache = ours(model)
            model(prompt(), past_key_values=cache)
            with pytest.raises(ValueError, match="layer 0="):
                cache.save(path)


@pytest.mark.parametrize("make", [qaxis.Cache, qaxis.Int8Cache])
def test_a_cache_that_is_dropped_is_gone_without_the_collector(make):
    gc.disable()
    try:
        cache = make(tf.LlamaConfig(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=64))
        for layer in range(2):
            cache.update(*torch.randn(2, 1, 1, 130, 64), layer)
        held = [weakref.ref(layer) for layer in cache.shared.holders]
        twin = copy.deepcopy(cache)
        assert (
            len(held) == 2 and len(twin.shared.holders) == 2 and twin.shared.holders[0] is not cache.shared.holders[0]
        )
        del cache
        assert all(reference() is None for reference in held)
    finally:
        gc.enable()

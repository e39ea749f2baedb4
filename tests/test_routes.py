"""Which way attention goes under enable: the certified step over a cache kept in place, with the reference's tokens."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

import qaxis
from qaxis import Budget
from qaxis.attention.logits import Logits
from qaxis.decode import rows
from qaxis.models import decoding, routing
from qaxis.models.compiled import CompiledForward
from qaxis.models.holding import HOLDER
from qaxis.models.masks import Shown
from qaxis.models.routing import attend
from qaxis.models.settings import Settings, settings_of
from qaxis.storage.formats import Format
from qaxis.storage.grid import Grid

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

WINDOWED = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 12,
}  # fmt: skip


def prompt(n=40, batch=1):
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("index", ["codes", "bounds", "int8"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_steps_give_what_the_reference_gives(llama, backend, index):
    """A padded batch: what every layer gives for a token, bit for bit, and who computed it."""
    ids, mask = prompt(24, 2), torch.ones(2, 25, dtype=torch.long)
    mask[1, :7] = 0
    found = {}
    for way in ("reference", backend):
        cache = qaxis.Int8Cache(llama.config) if index == "int8" else qaxis.Cache(llama.config, index=index)
        with torch.inference_mode():
            with qaxis.sparse(llama, qaxis.Budget(0.2, 5), backend="reference"):
                llama(ids, attention_mask=mask[:, :24], past_key_values=cache)
            with qaxis.sparse(llama, qaxis.Budget(0.2, 5), backend=way), qaxis.record(llama) as recording:
                found[way] = llama(ids[:, :1], attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(*found.values())
    # CUDA C++ reads 8-bit caches of bfloat16 alone.
    engine = "triton" if index == "int8" else backend
    assert {name.split(":")[0] for name in recording.engines} == {engine}, recording.engines


def test_generate_is_given_a_cache_where_the_caller_names_none(llama):
    ids, seen = prompt(30), []
    forward = llama.forward
    llama.forward = lambda *args, **kwargs: (
        seen.append(type(kwargs.get("past_key_values"))),
        forward(*args, **kwargs),
    )[1]
    try:
        with qaxis.sparse(llama, qaxis.Budget(0.2, 5)):
            for options in (
                {}, {"past_key_values": DynamicCache(config=llama.config)}, {"cache_implementation": "static"},
                {"use_cache": False},
            ):  # fmt: skip
                llama.generate(ids, **GREEDY, **options)
                seen.append(None)
        llama.generate(ids, **GREEDY)
    finally:
        del llama.forward
    names, out = [x and x.__name__ for x in seen], []
    for name in names:
        if name not in out[-1:]:
            out.append(name)
    assert out == ["Cache", None, "DynamicCache", None, "StaticCache", None, "NoneType", None, "DynamicCache"]


def test_a_copy_generates_with_its_own_weights_and_off_leaves_nothing(llama):
    ids = prompt(30)
    model = copy.deepcopy(llama)
    before = set(model.__dict__)
    qaxis.enable(model, qaxis.Budget(0.2, 5))
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.data.neg_()
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    plain = model.generate(ids, **GREEDY)
    assert not torch.equal(plain, twin.generate(ids, **GREEDY))
    assert torch.equal(plain, loaded.generate(ids, **GREEDY))
    qaxis.disable(model)
    assert set(model.__dict__) == before and torch.equal(model.generate(ids, **GREEDY), llama.generate(ids, **GREEDY))


def test_a_generate_that_somebody_set_is_left_alone(llama):
    model = copy.deepcopy(llama)
    own = model.__dict__["generate"] = lambda *args, **kwargs: "own"
    qaxis.enable(model, 5)
    assert model.generate is own
    qaxis.disable(model)
    assert model.generate is own


def test_compiled_steps_give_what_the_model_gives(llama):
    """Traced and compiled around the opaque step; with the reference for a step, as there is no GPU here."""
    ids, model = prompt(30), copy.deepcopy(llama)
    qaxis.enable(model, qaxis.Budget(0.2, 5))
    compiled = CompiledForward(model.forward)
    compiled.forward = torch.compile(model.forward, dynamic=False, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        outputs = []
        for way in ("plain", "compiled"):
            cache = qaxis.Cache(model.config)
            model(ids, past_key_values=cache)
            kwargs = {"input_ids": ids[:, :1], "position_ids": torch.tensor([[30]]), "return_dict": True}
            if way == "plain":
                outputs.append(model(**kwargs, past_key_values=cache).logits)
                continue
            settings = settings_of(model.model.layers[0].self_attn)

            def step(q, k, v, layer, logits, cache=cache, settings=settings):
                keys, values = cache.update(k, v, layer)
                done = attend(
                    q, keys, values, None, lambda: torch.ones(1, 1, 1, 31, dtype=torch.bool), logits, settings
                )
                return done.output.transpose(1, 2).contiguous()

            outputs.append(compiled({**kwargs, "attention_mask": None}, cache, step).logits)
            assert cache.get_seq_length() == 31
    assert torch.equal(*outputs)
    with pytest.raises(RuntimeError, match="qaxis::step"):
        torch.ops.qaxis.step(
            torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), 0, 1.0, None, None
        )


def test_padding_that_a_window_still_sees_is_not_attended_to():
    """A layer in place counts tokens from the first; the mask of a window counts from the first that is left."""
    torch.manual_seed(0)
    config = MistralConfig(**WINDOWED)
    model = MistralForCausalLM(config).eval()
    ids, mask = prompt(20, 2), torch.ones(2, 22, dtype=torch.long)
    mask[1, :11] = 0
    found, masks = {}, {}
    for way in ("reference", "triton"):
        cache = qaxis.Cache(config)
        with torch.inference_mode():
            with qaxis.sparse(model, qaxis.Budget(0.5, 3), backend="reference"):
                model(ids, attention_mask=mask[:, :20], past_key_values=cache)
            with qaxis.sparse(model, qaxis.Budget(0.5, 3), backend=way), qaxis.record(model, masks=True) as recording:
                for i in (20, 21):
                    logits = model(ids[:, :1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits
                    found.setdefault(way, []).append(logits)
        masks[way] = recording.layers[0].masks
    assert all(map(torch.equal, *found.values()))
    # What was kept is said of the keys that a window still has, wherever they lie.
    assert all(map(torch.equal, *masks.values()))


def without_window(config):
    sibling = copy.deepcopy(config)
    sibling.sliding_window, sibling.layer_types = None, ["full_attention"] * config.num_hidden_layers
    return sibling


def test_a_step_knows_of_a_window_that_hides_nothing_yet(monkeypatch):
    """What is captured while the window hides nothing is replayed for tokens from which it does."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**WINDOWED)).eval()
    cache, windows = qaxis.Cache(without_window(model.config)), []
    write_rows = rows.write_rows
    monkeypatch.setattr(rows, "write_rows", lambda *a, **k: windows.append(k["window"]) or write_rows(*a, **k))
    with torch.inference_mode():
        with qaxis.sparse(model, 3, backend="reference"):
            model(prompt(6), past_key_values=cache)
        keys = held(cache)
        with pytest.raises(RuntimeError, match="later tokens"):
            decoding.shown_again(keys, None)
        with qaxis.sparse(model, 3, backend="triton"), routing.only_steps():
            model(prompt(1), past_key_values=cache)
    assert windows == [12] and decoding.shown_again(keys, None) == Shown(window=12)
    # Of keys of nobody's nothing is known.
    with pytest.raises(RuntimeError, match=r"do not lie in a qaxis\.Cache"):
        decoding.shown_again(keys.clone(), None)


def held(cache):
    """Keys as the first layer of a cache of ours hands them to attention."""
    kv = cache.layers[0].kv
    keys = kv.views()[0]
    setattr(keys, HOLDER, kv)
    return keys


@pytest.mark.parametrize("kind", ["ours", "sibling", "dynamic", "static"])
def test_windows_hide_the_same_in_every_cache(kind, monkeypatch):
    monkeypatch.setattr(decoding, "PLACES", 128)
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**WINDOWED)).eval()
    ids, found = prompt(20), []
    for backend in ("reference", "triton"):
        cache = {
            "ours": lambda: qaxis.Cache(model.config), "sibling": lambda: qaxis.Cache(without_window(model.config)),
            "dynamic": lambda: DynamicCache(config=model.config),
            "static": lambda: StaticCache(config=model.config, max_cache_len=32),
        }[kind]()  # fmt: skip
        with torch.inference_mode():
            with qaxis.sparse(model, 3, backend="reference"):
                model(ids[:, :11], past_key_values=cache)
                whole = [model(ids[:, : n + 1]).logits[:, -1:] for n in (11, 12)]
            with qaxis.sparse(model, 3, backend=backend):
                found.append([model(ids[:, n : n + 1], past_key_values=cache).logits for n in (11, 12)])
    assert all(map(torch.equal, *found))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(found[0], whole, strict=True))


def test_what_lasts_for_these_tokens_alone_is_no_step_to_be_repeated(llama):
    cache = qaxis.Cache(llama.config)
    with torch.inference_mode():
        llama(prompt(10), past_key_values=cache)
    keys = held(cache)
    assert decoding.not_repeatable(keys, Shown(window=3)) == ""
    assert "later tokens" in decoding.not_repeatable(keys, Shown(lasts=False))


ALL = Shown()


def refused(m, exactness, shown=ALL):
    q = torch.zeros(1, 1, m, 16)
    settings = Settings(Budget(0.5, 3), exactness, "triton")
    done = routing.attend(
        q, q.repeat(1, 1, 3, 1)[:, :, : m + 2], q.repeat(1, 1, 3, 1)[:, :, : m + 2], shown,
        lambda: torch.ones(1, 1, m, m + 2, dtype=torch.bool), Logits(0.25), settings,
    )  # fmt: skip
    return done.engine, done.reason, done.asked


def test_every_refusal_is_told_once_and_whether_it_was_asked_for():
    no_range = "the mask is no range of keys"
    assert refused(1, "bitwise", None) == ("canonical", no_range, False)
    # A few queries were refused as steps first, then as a prompt.
    assert refused(3, "bitwise", None) == ("canonical", f"{no_range}; exactness='bitwise'", True)
    assert refused(3, "auto", None)[1] == f"{no_range}; there is no GPU"
    assert refused(20, "bitwise") == ("canonical", "exactness='bitwise'", True)
    assert refused(3, "selection", None) == ("masked", no_range, False)


@pytest.mark.parametrize("sliding", [None, 12])
def test_a_dense_layer_of_a_token_reads_all_places_and_sees_its_keys(sliding):
    """So that a captured step may have dense layers: the numbers of ordinary dense attention, padded and in windows."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=sliding)
    model = MistralForCausalLM(config).eval()
    ids, mask = prompt(20, 2), torch.ones(2, 22, dtype=torch.long)
    mask[1, :11] = 0
    found = {}
    for way in ("reference", "triton"):
        cache = qaxis.Cache(config, room=600)
        with torch.inference_mode():
            with qaxis.sparse(model, {0: "dense", 1: 3}, backend="reference"):
                model(ids, attention_mask=mask[:, :20], past_key_values=cache)
            with qaxis.sparse(model, {0: "dense", 1: 3}, backend=way), qaxis.record(model) as recording:
                for i in (20, 21):
                    logits = model(ids[:, :1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits
                    found.setdefault(way, []).append(logits)
    torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-5, atol=1e-6)
    assert sum(n for name, n in recording.engines.items() if name.startswith("dense")) == 2


CACHES = {
    "codes": lambda config: qaxis.Cache(config),
    "bounds": lambda config: qaxis.Cache(config, index="bounds"),
    "int8": lambda config: qaxis.Int8Cache(config),
    "int6": lambda config: qaxis.Int8Cache(config, format="int6"),
    "int4": lambda config: qaxis.Int8Cache(config, format="int4"),
    "a format of one's own": lambda config: qaxis.Int8Cache(config, format=Format(values=Grid(8, "token", 16))),
    "dynamic": lambda config: DynamicCache(config=config),
}
#: whose keys are numbers, of all places that there is room for
IN_FULL = ("codes", "bounds")


@pytest.fixture
def small(monkeypatch):
    """A model of two layers, whose attention costs little."""
    monkeypatch.setattr(decoding, "PLACES", 128)
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()


def stepped(model, name, backend, **options):
    """A prompt of more than a group, then a token by a backend: its logits, and how attention of it went."""
    cache, budget = CACHES[name](model.config), Budget(0.2, 5)
    with torch.inference_mode():
        with qaxis.sparse(model, budget, backend="reference", **options):
            model(prompt(131), past_key_values=cache)
        with qaxis.sparse(model, budget, backend=backend, **options), qaxis.record(model) as recording:
            return model(prompt(1), past_key_values=cache).logits, recording.engines


@pytest.mark.parametrize("completion", ["none", "linear"])
@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
@pytest.mark.parametrize("first_dense", [1, 2])
@pytest.mark.parametrize("name", CACHES)
def test_a_token_of_dense_layers_reads_every_cache(small, name, first_dense, backend, completion):
    options = {"first_dense": first_dense, "completion": completion}
    found, engines = stepped(small, name, backend, **options)
    # Sums over all places are rounded otherwise than those over tokens, and codes weigh what they leave out roughly.
    roughly = (name, backend, completion, first_dense) == ("codes", "cuda", "linear", 1)
    atol = 1e-3 if roughly else 1e-6 if name in IN_FULL else 0
    torch.testing.assert_close(found, stepped(small, name, "reference", **options)[0], rtol=0, atol=atol)
    assert sum(n for engine, n in engines.items() if engine.startswith("dense")) == first_dense
    if backend != "auto" and completion == "none" and first_dense == 1:
        assert any(engine.split(":")[0] in ("triton", "cuda") for engine in engines)


@pytest.mark.parametrize("name", CACHES)
def test_a_token_of_dense_layers_of_float16_reads_every_cache(small, name):
    """No kernel reads 8 bits of float16 either."""
    found, engines = stepped(small.half(), name, "triton", first_dense=1)
    torch.testing.assert_close(found, stepped(small, name, "reference", first_dense=1)[0], rtol=0, atol=2.0**-8)
    assert sum(n for engine, n in engines.items() if engine.startswith("dense")) == 1


@pytest.mark.parametrize("name", CACHES)
def test_a_captured_dense_layer_reads_all_places_or_is_no_step(small, name):
    """Codes have no numbers at places without a token, so a graph of these would be that of no other token."""
    cache = CACHES[name](small.config)
    with torch.inference_mode(), qaxis.sparse(small, "dense", backend="triton"):
        small(prompt(131), past_key_values=cache)
        with routing.only_steps():
            if name in IN_FULL:
                small(prompt(1), past_key_values=cache)
                return
            with pytest.raises(RuntimeError, match="the layer is dense"):
                small(prompt(1), past_key_values=cache)


def test_a_dense_step_is_of_keys_and_values_of_one_cache(small):
    cache, q = qaxis.Cache(small.config), torch.randn(1, 2, 1, 32)
    with torch.inference_mode():
        small(prompt(20), past_key_values=cache)
    keys, values = held(cache), cache.layers[0].kv.views()[1] + 1
    settings = Settings(None, backend="triton")
    assert decoding.refusal(q, keys, values, ALL, Logits(0.25), settings) == decoding.DENSE
    setattr(values, HOLDER, cache.layers[0].kv)
    assert decoding.refusal(q, keys, values, ALL, Logits(0.25), settings) is None

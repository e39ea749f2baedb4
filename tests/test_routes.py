"""Which way attention goes under enable: the certified step over a cache kept in place, with the reference's tokens."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

import qaxis
from qaxis.models.compiled import CompiledForward
from qaxis.models.routing import attend
from qaxis.models.settings import settings_of

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


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
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
    config = MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=12)
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

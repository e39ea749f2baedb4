"""When a step is captured, proven, replayed and dropped: the states of a call of generate, without a GPU.

In the place of a CUDA graph stands one that does what a graph does, seen from outside: it gives what the model's
forward pass gave when it was captured, hooks, adapters and weights included, whatever the model has become since.
"""

from __future__ import annotations

import copy
import logging
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DynamicCache, JambaConfig, JambaForCausalLM

import qaxis
from qaxis.models import generation, replaying, settings
from qaxis.models.captured import CACHE, MASK, CapturedStep, distance, fresh, same, taken_back
from qaxis.models.model_state import ModelState
from qaxis.models.stand_in import StandIn, standing_in

GREEDY = {"do_sample": False, "pad_token_id": 0}


class Graph:
    """As :class:`qaxis.models.captured.CapturedStep`, with a twin of the model for what lies in a graph."""

    made: list[Graph]

    def __init__(self, forward, kwargs, pads):
        self.cache, self.pads, self.replays = kwargs[CACHE], pads, 0
        self.names, self.version = kwargs.keys(), self.cache.shared.version
        twin = copy.deepcopy(Graph.model)
        qaxis.enable(twin, qaxis.Budget(0.2, 5), backend="reference")
        self.forward, self.captured = twin.forward, forward
        Graph.made.append(self)

    def goes_on(self, kwargs):
        return kwargs.keys() == self.names and kwargs[CACHE] is self.cache and self.version == self.cache.shared.version

    def replay(self, kwargs):
        self.replays += 1
        self.output = self.forward(**kwargs)


def without_gpu(compiled=None):
    """What stands for :func:`qaxis.models.replaying.replaying` here: the same, on any device."""

    def replays(model, _=None):
        return standing_in(model, "forward", lambda forward: replaying.Replaying(model, forward, compiled))

    return replays


@pytest.fixture
def model(llama, monkeypatch):
    """A model that replays on a CPU from its third token on."""
    monkeypatch.setattr(replaying, "CapturedStep", Graph)
    monkeypatch.setattr(replaying, "LEAST", 8)
    model = copy.deepcopy(llama)
    Graph.model, Graph.made = copy.deepcopy(llama), []
    qaxis.enable(model, qaxis.Budget(0.2, 5), backend="reference")

    monkeypatch.setattr(generation, "replaying", without_gpu())
    return model


def prompt(batch=1):
    return torch.randint(3, 97, (batch, 20), generator=torch.Generator().manual_seed(1))


class Then:
    """Something done to a model after so many tokens."""

    def __init__(self, at, what):
        self.at, self.what, self.tokens = at, what, 0

    def __call__(self, ids, scores, **_):
        self.tokens += 1
        if self.tokens == self.at:
            self.what()
        return torch.zeros(ids.shape[0], dtype=torch.bool)


def generate(model, then=None, tokens=16, **options):
    return model.generate(
        prompt(), **GREEDY, max_new_tokens=tokens, min_new_tokens=tokens, stopping_criteria=[then] if then else None,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


def replays():
    return [graph.replays for graph in Graph.made]


def eager(model, then=None, tokens=16, **options):
    """What the same call gives where nothing is replayed."""
    before, replaying.WARM = replaying.WARM, 10**9
    try:
        return generate(model, then, tokens, **options)
    finally:
        replaying.WARM = before


def alike(x, y):
    return torch.equal(x.sequences, y.sequences) and all(map(torch.equal, x.logits, y.logits))


def test_tokens_are_replays_once_two_were_proven(model):
    out = generate(model)
    assert replays() == [13] and alike(out, eager(model)) and len(Graph.made) == 1
    # A prompt, two warm steps; the rest is replayed, two of it to be proven.
    assert out.past_key_values.get_seq_length() == 35


def lora(model):
    """A branch that a setting switches on, as adapters have."""
    layer = model.model.layers[0].mlp.down_proj
    plain = layer.forward
    layer.on = False
    layer.forward = lambda x: plain(x) + (x.sum(-1, keepdim=True) if layer.on else 0)
    return lambda: setattr(layer, "on", True)


def hooked(model):
    return lambda: model.model.layers[1].register_forward_hook(lambda module, args, output: output * 2)


def replaced(model):
    return lambda: setattr(model.model.layers[0].mlp, "act_fn", nn.Tanh())


def weights(model):
    layer = model.lm_head
    return lambda: setattr(layer.weight, "data", layer.weight.data.neg().clone())


def parameter(model):
    return lambda: setattr(model.model.norm, "weight", nn.Parameter(torch.full_like(model.model.norm.weight, 3.0)))


def less(model):
    return lambda: qaxis.enable(model, 1, backend="reference")


def off(model):
    return lambda: qaxis.disable(model)


def configured(model):
    scaling = model.model.layers[0].self_attn
    return lambda: setattr(scaling, "scaling", 3.0)


@pytest.mark.parametrize("change", [lora, hooked, replaced, weights, parameter, less, off, configured])
def test_what_changes_a_model_under_generate_is_seen(model, change):
    """By the very next token: no replay gives what the model was."""
    twin = copy.deepcopy(model)
    then, other = Then(8, change(model)), Then(8, change(twin))
    Graph.model = copy.deepcopy(model)
    for module in Graph.model.modules():
        module.__dict__.pop("forward", None)
    out, expected = generate(model, then), eager(twin, other)
    assert alike(out, expected) and replays()[0] < 10


def test_a_model_that_never_stops_changing_is_left_alone(model, caplog):
    class Always(Then):
        def __call__(self, ids, scores, **_):
            model.changed = object()
            return super().__call__(ids, scores)

    with caplog.at_level(logging.INFO):
        out = generate(model, Always(0, None), tokens=40)
    assert alike(out, eager(model, tokens=40))
    assert len(Graph.made) == replaying.MOST_CHANGES and "changed between tokens" in caplog.text


def test_autocast_and_observers_are_seen(model):
    seen = []
    with qaxis.observe_attention(model, lambda *args: seen.append(args[0])):
        generate(model)
    assert not Graph.made and len(seen) == 16 * len(model.model.layers)
    began = []

    def observe():
        began.append(qaxis.observe_attention(model, lambda *args: seen.append(args[0])))
        began[0].__enter__()
        seen.clear()

    generate(model, Then(8, observe))
    began[0].__exit__(None, None, None)
    assert len(seen) == 8 * len(model.model.layers)


def test_a_replay_that_is_wrong_late_is_found_and_said(model, monkeypatch, caplog):
    """A number on the host that matters from some token on."""
    monkeypatch.setattr(replaying, "AGAIN", 8)
    plain = Graph.replay

    def late(self, kwargs):
        plain(self, kwargs)
        if self.replays > 6:
            self.output.logits.add_(1.0)

    monkeypatch.setattr(Graph, "replay", late)
    generate(model, tokens=30)
    assert replays() == [9] and "keeps something on the host" in caplog.text and "of the last 8 tokens" in caplog.text


def test_a_replay_that_is_wrong_at_once_is_never_used(model, monkeypatch):
    plain = Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda self, kwargs: (plain(self, kwargs), self.output.logits.add_(1.0))[0])
    assert alike(generate(model), eager(model)) and replays() == [1]


@pytest.mark.parametrize("off", [0.02, 0.5])
def test_compiled_steps_that_are_too_far_from_the_model_are_not_used(model, monkeypatch, caplog, off):
    """Steps of the model itself are captured then. In the place of a compiler stands one that adds something."""

    class Compiled:
        def __call__(self, kwargs, cache, step):
            with torch.no_grad():
                output = Graph.twin(**{**kwargs, CACHE: cache})
            spread = output.logits.std()
            return type(output)(logits=output.logits + off * spread * torch.linspace(-1, 1, 97), past_key_values=cache)

    Graph.twin = copy.deepcopy(Graph.model)
    qaxis.enable(Graph.twin, qaxis.Budget(0.2, 5), backend="reference")

    monkeypatch.setattr(generation, "replaying", without_gpu(Compiled()))
    monkeypatch.setattr(Graph, "replay", lambda self, kwargs: setattr(self, "output", self.captured(**kwargs)))
    generate(model)
    assert len(Graph.made) == (1 if off < 0.1 else 2)
    assert ("off by" in caplog.text) == (off > 0.1)


def test_a_capture_that_fails_costs_nothing_but_time(model, monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replaying, "CapturedStep", fails)
    assert (
        alike(generate(model), eager(model)) and "the step cannot be captured (operation not permitted" in caplog.text
    )


def test_a_dense_layer_over_codes_is_told_before_anything_is_captured(model, caplog):
    qaxis.enable(model, {0: "dense", 1: 5}, backend="reference")
    with caplog.at_level(logging.INFO):
        generate(model, past_key_values=qaxis.Int8Cache(model.config))
    assert not Graph.made and "a layer is dense, over a cache of codes" in caplog.text


def test_a_model_that_was_once_asked_for_hidden_states_is_replayed(model, caplog):
    """transformers leaves hooks on it that collect nothing any more."""
    with torch.no_grad():
        model(prompt(), output_hidden_states=True)
    assert alike(generate(model), eager(model)) and replays() == [13]
    with caplog.at_level(logging.INFO):
        states = generate(model, output_hidden_states=True).hidden_states
    assert len(Graph.made) == 1 and "hidden states" in caplog.text and len(states) == 16


def test_a_mask_that_is_no_tensor_is_left_to_the_model(model):
    cache = qaxis.Cache(model.config)
    with torch.no_grad(), generation.replaying(model):
        model(prompt(), past_key_values=cache)
        for i in range(4):
            kwargs = {"position_ids": torch.tensor([[20 + i]]), "past_key_values": cache, "return_dict": True}
            try:
                model(input_ids=prompt()[:, :1], attention_mask={"full_attention": None}, **kwargs)
            except Exception as error:  # as without qaxis: Llama takes no dict
                assert "ndim" not in str(error) or "dict" in str(error)
    assert not Graph.made


def test_nothing_is_captured_while_another_thread_generates(model, caplog):
    """Random numbers that it draws meanwhile would raise there."""
    gate, begun = threading.Event(), threading.Event()

    def generates():
        with replaying._counted(torch.device("cpu")):
            begun.set()
            gate.wait(60)

    thread = threading.Thread(target=generates)
    thread.start()
    begun.wait(60)
    with caplog.at_level(logging.INFO):
        out = generate(model, Then(8, lambda: (gate.set(), thread.join())))
    assert "another thread generates" in caplog.text and replays() == [8] and alike(out, eager(model))
    assert replaying._generating[torch.device("cpu")] == []


def test_counting_calls_is_no_change_of_a_model(model):
    """As a recording of another thread does."""
    attention = model.model.layers[0].self_attn
    out = generate(model, Then(8, lambda: settings.count_call(attention)))
    assert replays() == [13] and alike(out, eager(model))


def test_what_was_cropped_is_read_by_nobody(llama):
    """A dense layer reads all places of a captured step; what a number beyond the end was does not matter."""
    cache = qaxis.Cache(llama.config, room=64)
    with torch.no_grad():
        llama(prompt(), past_key_values=cache)
        llama(prompt()[:, :3], past_key_values=cache)
    for layer in cache.layers:
        for x in layer.kv.whole():
            x[:, :, 20:23] = float("nan")
    cache.crop(-3)
    assert all(bool(x.isfinite().all()) for layer in cache.layers for x in layer.kv.whole())


def test_prompts_of_models_with_a_recurrent_state_are_not_cut(monkeypatch, caplog):
    monkeypatch.setattr(generation, "LONG_PROMPT", 10)
    monkeypatch.setattr(generation, "CHUNK", 8)
    torch.manual_seed(0)
    config = JambaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2,
        use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4,
    )  # fmt: skip
    model = JambaForCausalLM(config).eval()
    expected = model.generate(prompt(), **GREEDY, max_new_tokens=4)
    qaxis.enable(model, qaxis.Budget(1.0, 1))
    with caplog.at_level(logging.INFO):
        assert torch.equal(model.generate(prompt(), **GREEDY, max_new_tokens=4), expected)
    assert "is not cut into chunks, as layer 0 of its cache is a" in caplog.text


def test_padding_is_captured_wherever_there_is_a_mask(model):
    """None of a row may be padding now, and some of the row that takes its place."""
    cache, ids, mask = qaxis.Cache(model.config), prompt(2), torch.ones(2, 20, dtype=torch.long)
    with torch.no_grad(), generation.replaying(model):
        model(ids, attention_mask=mask, past_key_values=cache)
        for i in range(4):
            mask, at = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1), torch.tensor([[20 + i]] * 2)
            model(input_ids=ids[:, :1], attention_mask=mask, position_ids=at, past_key_values=cache, return_dict=True)
    (graph,) = Graph.made
    assert graph.pads.dtype == torch.int32 and graph.pads.tolist() == [0, 0]


def test_padding_is_told_before_every_replay(llama):
    cache, seen = qaxis.Cache(llama.config), []
    with torch.no_grad():
        llama(prompt(2), past_key_values=cache)
    step = object.__new__(CapturedStep)
    step.cache, step.pads, step.inputs = cache, torch.zeros(2, dtype=torch.int32), {}
    step.graph = SimpleNamespace(replay=lambda: seen.append((step.pads.tolist(), cache.shared.clock.at)))
    mask = torch.ones(2, 22, dtype=torch.long)
    for row in (1, 0):
        mask[:] = 1
        mask[row, :7] = 0
        step.replay({MASK: mask})
    assert seen == [([0, 7], 20), ([7, 0], 21)] and cache.get_seq_length() == 22


def test_long_prompts_go_in_chunks_only_where_it_cannot_matter(model, monkeypatch):
    monkeypatch.setattr(generation, "LONG_PROMPT", 10)
    monkeypatch.setattr(generation, "CHUNK", 8)
    sizes, inner = [], model.model
    hook = inner.register_forward_pre_hook(
        lambda m, args, kwargs: sizes.append((kwargs.get("input_ids"), kwargs.get("inputs_embeds"))), with_kwargs=True
    )

    def lengths():
        found = [(a if a is not None else b).shape[1] for a, b in sizes]
        sizes.clear()
        return found

    ids, options = prompt(), {**GREEDY, "max_new_tokens": 2, "min_new_tokens": 2}
    model.generate(ids, **options)
    assert lengths() == [8, 8, 4, 1]
    model.generate(inputs_embeds=inner.embed_tokens(ids).detach(), **options)
    assert lengths() == [20, 1]
    states = model.generate(ids, **options, return_dict_in_generate=True, output_hidden_states=True).hidden_states
    assert lengths() == [20, 1] and states[0][0].shape[1] == 20
    inner.config.output_hidden_states = True
    model.generate(ids, **options)
    assert lengths() == [20, 1]
    inner.config.output_hidden_states = False
    model.generate(ids, **options, prefill_chunk_size=15)
    assert lengths() == [15, 5, 1]
    inner.layers[0].self_attn.rope_type = "longrope"
    model.generate(ids, **options)
    assert lengths() == [20, 1]
    hook.remove()


def test_an_assistant_that_is_enabled_takes_back_what_it_drafted(llama):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
    torch.manual_seed(0)
    config = MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=16)
    assistant, target = MistralForCausalLM(config).eval(), copy.deepcopy(llama)
    for model in (assistant, target):
        qaxis.enable(model, qaxis.Budget(0.2, 5))
    plain = target.generate(prompt(), **GREEDY, max_new_tokens=30)
    assert torch.equal(plain, target.generate(prompt(), assistant_model=assistant, **GREEDY, max_new_tokens=30))


def test_caches_that_transformers_would_not_make_are_not_ours(llama):
    model = copy.deepcopy(llama)
    qaxis.enable(model, qaxis.Budget(0.2, 5))

    def made(**options):
        done = model.generate(prompt(), **GREEDY, max_new_tokens=2, return_dict_in_generate=True, **options)
        return type(done.past_key_values).__name__

    assert made() == "Cache" and made(cache_implementation="dynamic") == "DynamicCache"
    assert made(past_key_values=DynamicCache(config=model.config)) == "DynamicCache"
    assert "_prepare_cache_for_generation" not in model.__dict__ and "forward" not in model.__dict__
    # As MiniMax, which has a cache of its own.
    type(model)._supports_default_dynamic_cache, before = (
        classmethod(lambda cls: False), type(model)._supports_default_dynamic_cache,
    )  # fmt: skip
    try:
        assert made(use_cache=False) == "NoneType"
    finally:
        del type(model)._supports_default_dynamic_cache
    assert type(model)._supports_default_dynamic_cache == before


def test_what_stands_for_a_method_goes_when_the_last_thread_does(llama):
    model, gate, seen = copy.deepcopy(llama), threading.Event(), []

    def waits():
        with standing_in(model, "forward", lambda forward: lambda *_: "theirs"):
            seen.append(model("x"))
            gate.wait(60)

    thread = threading.Thread(target=waits)
    with standing_in(model, "forward", lambda forward: lambda *_: "mine"):
        thread.start()
        while not seen:
            pass
        assert model("x") == "mine"
    assert isinstance(model.__dict__["forward"], StandIn) and not isinstance(model(prompt()).logits, str)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(prompt()).logits, model(prompt()).logits) and twin.forward.__self__ is twin
    gate.set()
    thread.join()
    assert "forward" not in model.__dict__ and seen == ["theirs"]


def test_outputs_are_compared_and_copied_in_whatever_they_come():
    x = torch.tensor([1.0, float("nan")])
    whole = {"a": [x, (x, None)], "b": 3}
    twin = fresh(whole)
    assert same(whole, twin) and twin["a"][0] is not x and twin["a"][1][0] is not x
    for name in ("list", "tuple", "number"):
        other = fresh(whole)
        if name == "number":
            other["b"] = 4
        else:
            (other["a"][0] if name == "list" else other["a"][1][0])[0] = -0.0
        assert not same(whole, other)
    assert not same(torch.zeros(1), -torch.zeros(1)) and not same([x], (x,))


def test_logits_are_apart_by_how_they_spread():
    logits = torch.randn(1, 1, 1000, generator=torch.Generator().manual_seed(0)) + 100
    off = torch.randn(1, 1, 1000, generator=torch.Generator().manual_seed(1))
    # Of the largest logit that would be a thousandth.
    assert distance({"logits": logits + 0.2 * off}, {"logits": logits}) == pytest.approx(0.2, rel=0.1)


def test_a_model_that_nobody_changed_is_unchanged(llama):
    model = copy.deepcopy(llama)
    before = ModelState(model)
    with torch.no_grad():
        model(prompt())
    assert before.unchanged()
    with torch.autocast("cuda", enabled=torch.cuda.is_available()):
        assert before.unchanged() != torch.cuda.is_available()
    with torch.no_grad():
        assert not before.unchanged()


def test_what_is_taken_back_is_appended_again_to_the_same_places(llama):
    model, cache = copy.deepcopy(llama), qaxis.Cache(llama.config)
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
        with taken_back(cache):
            model(prompt()[:, :1], past_key_values=cache)
        assert cache.get_seq_length() == 20
        once = model(prompt()[:, :1], past_key_values=cache).logits
        plain = DynamicCache(config=llama.config)
        model(prompt(), past_key_values=plain)
        assert torch.equal(once, model(prompt()[:, :1], past_key_values=plain).logits)

"""Recording, observing and strict mode: what they say is so, and the model computes what it does without them."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest
import torch
import transformers as tf
from transformers import AttentionInterface

import qaxis
from selfcheck.checks.families import FAMILIES, GQA, build, prompt

THREADS, TIMES = 3, 15


def at_once(work) -> list[BaseException]:
    """What several threads raise that do the same thing at the same time, many times."""
    raised: list[BaseException] = []
    barrier = threading.Barrier(THREADS)

    def run():
        barrier.wait()
        try:
            with torch.inference_mode():
                for _ in range(TIMES):
                    work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def llava(one: str = "sdpa", other: str = "eager"):
    """A model with a vision tower; implementations of text and tower."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = tf.CLIPVisionConfig(**small, image_size=28, patch_size=14)
    config = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**GQA), image_token_index=96)
    model = tf.LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    model.set_attn_implementation({"text_config": one, "vision_config": other})
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_observing_changes_no_bit_of_any_family(family):
    implementations = ["eager"] if family in ("Gemma 2", "gpt-oss") else ["eager", "sdpa"]
    for implementation in implementations:
        model, ids, seen = build(family, implementation), prompt(), []
        configuration, attributes = model.config.to_dict(), [set(m.__dict__) for m in model.modules()]
        plain = model(ids).logits
        with qaxis.observe_attention(model, lambda *call, seen=seen: seen.append(call)):
            assert torch.equal(model(ids).logits, plain)
            assert model.config._attn_implementation == implementation
        assert [call[0] for call in seen] == [0, 1]
        assert torch.equal(model(ids).logits, plain) and len(seen) == 2
        assert model.config.to_dict() == configuration
        assert attributes == [set(m.__dict__) for m in model.modules()]


@torch.inference_mode()
def test_observers_see_what_attention_computes_with(llama):
    seen = []
    with qaxis.observe_attention(llama, lambda *call: seen.append(call)):
        llama(prompt())
    layer, q, k, v, scale = seen[0]
    assert (layer, scale) == (0, 16**-0.5) and q.shape[1] == 6 and k.shape == v.shape == (1, 2, 60, 16)
    out = qaxis.topk_attention(q, k, v, 60, scale=scale).output.transpose(1, 2).reshape(1, 60, -1)
    taken = []
    hook = llama.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    llama(prompt())
    hook.remove()
    assert torch.allclose(out, taken[0], atol=1e-5)


@torch.inference_mode()
def test_observing_sparse_attention_leaves_it_sparse(llama):
    ids, seen = prompt(), []
    with qaxis.sparse(llama, 8):
        plain = llama(ids).logits
        with qaxis.observe_attention(llama, lambda *call: seen.append(call)), qaxis.record(llama) as recording:
            assert torch.equal(plain, llama(ids).logits)
    with qaxis.observe_attention(llama, lambda *call: seen.append(call)), qaxis.sparse(llama, 8):
        assert torch.equal(plain, llama(ids).logits)
    assert len(seen) == 4 and recording.fallbacks == 0 and recording.layers[1].sparse_calls == 1


@torch.inference_mode()
def test_observers_of_several_models_nest_and_leave_nothing(llama):
    look_up = AttentionInterface.get_interface
    config = tf.LlamaConfig(**GQA)
    one, two, ids = tf.LlamaForCausalLM(config).eval(), tf.LlamaForCausalLM(config).eval(), prompt()
    seen: dict[str, int] = {"one": 0, "again": 0, "two": 0}

    def counter(name):
        return lambda *call: seen.__setitem__(name, seen[name] + 1)

    with pytest.raises(KeyError), qaxis.observe_attention(one, counter("one")):
        with qaxis.observe_attention(one, counter("again")), qaxis.observe_attention(two, counter("two")):
            one(ids)
        one(ids)
        two(ids)
        raise KeyError
    one(ids)
    assert seen == {"one": 4, "again": 2, "two": 0} and AttentionInterface.get_interface is look_up

    # Not in the order of a stack.
    first, second = qaxis.observe_attention(one, counter("one")), qaxis.observe_attention(one, counter("again"))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    one(ids)
    second.__exit__(None, None, None)
    assert seen == {"one": 4, "again": 4, "two": 0} and AttentionInterface.get_interface is look_up

    def fails(*call):
        raise RuntimeError("observer")

    with pytest.raises(RuntimeError, match="observer"), qaxis.observe_attention(one, fails):
        one(ids)
    assert AttentionInterface.get_interface is look_up


def test_every_sub_configuration_keeps_its_implementation():
    model = llava()
    with qaxis.observe_attention(model, lambda *call: None):
        assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "eager"


def test_what_cannot_be_observed_is_refused(llama):
    mamba = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="model='MambaForCausalLM'"), qaxis.observe_attention(mamba, print):
        pass
    with pytest.raises(ValueError, match="model='OptimizedModule'"):
        qaxis.observe_attention(torch.compile(llama, backend="eager"), print).__enter__()


def test_threads_that_share_a_model_are_recorded_and_judged_apart(llama):
    ids = prompt()[:, :12]
    with qaxis.sparse(llama, 4, strict=True):
        with torch.inference_mode():
            plain = llama(ids).logits
        with qaxis.record(llama, masks=True) as recording:
            assert at_once(lambda: llama(ids)) == []
        with torch.inference_mode(), qaxis.record(llama) as alone:
            assert torch.equal(llama(ids).logits, plain)
    passes = THREADS * TIMES
    assert recording.fallbacks == 0 and recording.tokens == passes * 12 and recording.seconds > 0
    for layer, record in recording.layers.items():
        assert record.queries == passes * 12 and record.sparse_calls == len(record.masks) == passes
        assert torch.equal(record.kept, passes * alone.layers[layer].kept)
        assert torch.allclose(record.entropy_sum, passes * alone.layers[layer].entropy_sum, rtol=1e-12)


def test_a_thread_that_goes_around_is_found_while_others_do_not(llama):
    """Attention of one thread comes from elsewhere: its runs count, and only those."""
    ids, around, look_up = prompt()[:, :12], threading.local(), AttentionInterface.get_interface

    def other(self, name, default):
        return look_up(self, "sdpa" if getattr(around, "me", False) else name, default)

    AttentionInterface.get_interface = other
    try:
        with qaxis.sparse(llama, 4):
            turn = iter(range(THREADS))
            marked: set[int] = set()

            def work():
                if threading.get_ident() not in marked:
                    marked.add(threading.get_ident())
                    around.me = next(turn) == 0
                llama(ids)

            with qaxis.record(llama) as recording:
                assert at_once(work) == []
            assert recording.fallbacks == 2 * TIMES
            turn, strict_raised = iter(range(THREADS)), []
            marked.clear()
            with qaxis.sparse(llama, 4, strict=True):
                strict_raised = at_once(work)
        assert len(strict_raised) == 1 and "layer 0" in str(strict_raised[0])
    finally:
        AttentionInterface.get_interface = look_up


def test_recordings_that_begin_and_end_while_others_run(llama):
    ids = prompt()[:, :12]

    def work():
        with qaxis.record(llama, masks=True) as recording:
            llama(ids)
        own = recording.layers[0]
        assert recording.fallbacks == 0 and own.sparse_calls == len(own.masks) >= 1

    for options in ({}, {"exactness": "selection"}):
        with qaxis.sparse(llama, 4, **options):
            assert at_once(work) == []
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


@torch.inference_mode()
def test_whatever_way_a_model_is_called_is_recorded(llama):
    ids = prompt()
    with qaxis.sparse(llama, 8), qaxis.record(llama) as recording:
        llama(ids)
        llama(input_ids=ids)
        llama(ids, return_dict=False)
        llama(inputs_embeds=llama.get_input_embeddings()(ids))
        llama.model(ids, return_dict=False)
        with pytest.raises(IndexError):
            llama(ids + 97)
    assert recording.tokens == 5 * 60 == recording.layers[1].queries and recording.fallbacks == 0
    qaxis.enable(llama.model, 8)
    with qaxis.record(llama) as recording, qaxis.record(llama.model) as inner:
        llama(ids)
    qaxis.disable(llama.model)
    assert recording.tokens == inner.tokens == recording.layers[0].queries == inner.layers[0].queries == 60


@torch.inference_mode()
def test_an_encoder_decoder_is_recorded_by_its_decoder():
    model = tf.MoonshineForConditionalGeneration._from_config(
        tf.MoonshineConfig(
            vocab_size=97, hidden_size=32, intermediate_size=32, encoder_num_hidden_layers=1, bos_token_id=1,
            decoder_num_hidden_layers=2, encoder_num_attention_heads=2, decoder_num_attention_heads=2, pad_token_id=0,
            eos_token_id=2, decoder_start_token_id=1, encoder_num_key_value_heads=2, decoder_num_key_value_heads=2,
        ),
        attn_implementation="sdpa",
    ).eval()  # fmt: skip
    with qaxis.sparse(model, 8), qaxis.record(model) as recording:
        model(input_values=torch.randn(1, 4000), decoder_input_ids=prompt()[:, :20])
    assert recording.tokens == 20 and recording.fallbacks == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_entropy_and_mass_are_float32_inside_autocast(llama, dtype):
    """Queries and keys are those of autocast; what is computed from them is not."""
    seen = []
    with qaxis.sparse(llama, 60), qaxis.record(llama) as recording, torch.autocast("cpu", dtype):
        with qaxis.observe_attention(llama, lambda layer, q, k, v, scale: seen.append((q.clone(), k.clone()))):
            llama(prompt())
    expected = qaxis.attention_entropy(*seen[0]).mean((0, 2))
    assert torch.allclose(recording.layers[0].entropy, expected, rtol=1e-5)
    assert torch.allclose(recording.layers[0].mass, torch.ones(6, dtype=torch.float64), rtol=1e-5)


@torch.inference_mode()
def test_a_compiled_model_is_recorded():
    """Compiled before the recording begins: its hooks are run nevertheless."""
    model, ids = tf.LlamaForCausalLM(tf.LlamaConfig(**{**GQA, "num_hidden_layers": 1})).eval(), prompt()
    torch._dynamo.reset()
    with qaxis.sparse(model, 8):
        plain, compiled = model(ids).logits, torch.compile(model, backend="eager")
        compiled(ids)
        with qaxis.record(compiled) as recording:
            assert torch.equal(compiled(ids).logits, plain)
    assert recording.tokens == recording.layers[0].queries == 60 and recording.fallbacks == 0


@torch.inference_mode()
def test_a_pass_that_began_before_the_recording_is_left_out(llama):
    recordings: list[qaxis.Recording] = []
    with qaxis.sparse(llama, 8, strict=True), ExitStack() as stack:
        # torch looks for hooks after a pass only where there was one before.
        stack.enter_context(qaxis.record(llama))
        hook = llama.model.layers[1].register_forward_pre_hook(
            lambda *_: recordings.append(stack.enter_context(qaxis.record(llama)))
        )
        llama(prompt())
        hook.remove()
    assert recordings[0].tokens == 0 and recordings[0].seconds == 0 and recordings[0].fallbacks == 0


@torch.inference_mode()
def test_queries_of_padding_are_not_counted(llama):
    ids = torch.cat([prompt()[:, :40]] * 2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with qaxis.sparse(llama, qaxis.Budget(1.0)), qaxis.record(llama) as recording:
        llama(ids, attention_mask=mask)
    layer = recording.layers[0]
    assert layer.queries == 73 and torch.allclose(layer.mass, torch.ones(6, dtype=torch.float64))

"""``enable(completion=)``: what a model's attention puts back, which way it goes then, and what is refused by name.

Budgets with a tolerance go the same way, to canonical attention.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

import qaxis
from qaxis import Budget
from qaxis.attention import completed
from qaxis.attention.always import Always
from qaxis.attention.completion import Seen, seen_of
from qaxis.attention.logits import Logits
from qaxis.attention.selection import causal_mask, indices_to_mask, mask_to_indices
from qaxis.decode import Decoder, places
from qaxis.models import attention, decoding, generation, replaying, routing
from qaxis.models.attended import TOLERANCE, Attended, Refusal
from qaxis.models.compiled import CompiledForward
from qaxis.models.holding import HOLDER
from qaxis.models.masks import Shown, dropped_before
from qaxis.models.settings import Settings, settings_of
from qaxis.storage.lazy import dequantized, stored_or_tensor
from qaxis.storage.side import Stored
from tests import test_replaying

KINDS = ("mean", "linear")
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
FEW = Budget(0.05, 9)
WINDOW = 200


def prompt(n=150, batch=1, seed=1):
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(seed))


def windowed(window=WINDOW, layers=1):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, head_dim=32,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=window,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def wide(dtype=torch.float32, layers=1):
    """A model whose keys have codes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, head_dim=64,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def sharing():
    """A model whose last layers share the keys of earlier ones."""
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=97, vocab_size_per_layer_input=97, hidden_size=64, hidden_size_per_layer_input=8, head_dim=16,
        global_head_dim=16, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
        initializer_range=0.3,
    )  # fmt: skip
    return Gemma4ForCausalLM(config).eval()


@pytest.fixture
def calls(monkeypatch):
    """Every attention call with what it gave."""
    seen = []
    attend = routing.attend

    def spy(q, k, v, *rest):
        done = attend(q, k, v, *rest)
        seen.append((q, k, v, done))
        return done

    monkeypatch.setattr(routing, "attend", spy)
    return seen


@pytest.mark.parametrize("kind", [*KINDS, "block"])
def test_a_forward_pass_is_topk_attention(llama, calls, kind):
    with (
        torch.inference_mode(),
        qaxis.sparse(llama, FEW, completion=kind),
        qaxis.record(llama, masks=True) as recording,
    ):
        whole = llama(prompt(), use_cache=False).logits
    assert len(calls) == 2 and {x[3].engine for x in calls} == {"canonical"}
    for i, (q, k, v, done) in enumerate(calls):
        expected = qaxis.topk_attention(q, k, v, FEW, completion=kind)
        assert torch.equal(done.output, expected.output)
        kept = torch.zeros(1, 6, 150, 151, dtype=torch.bool).scatter_(-1, expected.indices % 151, True)[..., :150]
        # What is recorded is what was kept: nothing that is put back counts.
        assert torch.equal(recording.layers[i].masks[0], kept)
    with torch.inference_mode(), qaxis.sparse(llama, FEW):
        assert not torch.equal(whole, llama(prompt(), use_cache=False).logits)


@torch.inference_mode()
def test_none_is_what_it_was(llama, calls):
    assert Settings().completion == "none" and attention._settings(llama.model.layers[0].self_attn).completion == "none"
    with qaxis.sparse(llama, FEW, completion="none"):
        llama(prompt())
    q, k, v, done = calls[0]
    assert torch.equal(done.output, qaxis.topk_attention(q, k, v, FEW).output)


def attended(q, k, v, kind, exactness="auto", backend="auto", shown=None, allowed=None, budget=FEW, **more):
    m, n = q.shape[2], k.shape[2]
    settings = Settings(budget, exactness, backend, completion=kind, **more)
    allowed = causal_mask(m, n, "cpu") if allowed is None else allowed
    return routing.attend(q, k, v, shown, lambda: allowed, Logits(0.25), settings)


def tensors(n=270, m=None, batch=1):
    g = torch.Generator().manual_seed(0)
    sizes = (batch, 4, n if m is None else m, 16), (batch, 2, n, 16), (batch, 2, n, 16)
    return tuple(torch.randn(*size, generator=g) for size in sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_and_a_chunk_give_the_rows_of_the_prompt(kind):
    q, k, v = tensors()
    whole = attended(q, k, v, kind)
    for start, stop in ((127, 128), (128, 129), (255, 256), (120, 130), (250, 270)):
        part = attended(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], kind)
        assert part.engine == "canonical" and torch.equal(part.output, whole.output[:, :, start:stop])


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_padding_is_not_put_back(llama, calls, kind):
    """A row sees what is not padding; the group that padding cuts takes no part in the fit."""
    ids, mask = prompt(300, 2), torch.ones(2, 300, dtype=torch.long)
    mask[1, :100] = 0
    with qaxis.sparse(llama, FEW, completion=kind):
        llama(ids, attention_mask=mask, use_cache=False)
    q, k, v, done = calls[0]
    for row, pads in ((0, 0), (1, 100)):
        allowed = causal_mask(300, 300, "cpu") & (torch.arange(300) >= pads)
        one = [x[row : row + 1] for x in (q, k, v)]
        alone = attended(*one, kind, allowed=allowed, budget=FEW)
        assert torch.equal(done.output[row : row + 1], alone.output)
        begin, end = torch.tensor([pads]), torch.arange(1, 301).clamp(min=pads)[None, None]
        expected = completed.attend(*one, allowed_indices(*one[:2], allowed), Logits(0.25), kind, Seen(begin, end))
        assert torch.equal(alone.output, expected)


def allowed_indices(q, k, allowed):
    from qaxis.attention import backend

    return backend.select(q, k, allowed, FEW.of(allowed))


@pytest.mark.parametrize("kind", ["ours", "sibling", "dynamic", "static"])
def test_what_a_window_dropped_counts_in_every_cache(kind):
    """Groups begin with the first token of the text: a token gives what the whole text gives without a cache."""
    model, ids = windowed(), prompt(336)
    unwindowed = copy.deepcopy(model.config)
    unwindowed.sliding_window, unwindowed.layer_types = None, ["full_attention"]
    cache = {
        "ours": lambda: qaxis.Cache(model.config), "sibling": lambda: qaxis.Cache(unwindowed),
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=400),
    }[kind]()  # fmt: skip
    with torch.inference_mode(), qaxis.sparse(model, 9, completion="linear"):
        whole = model(ids, use_cache=False).logits
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 320), (320, 323), (323, 324))]
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(324, 336)]
        parts = torch.cat(parts, 1)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    with torch.inference_mode(), qaxis.sparse(model, 9):
        assert (model(ids, use_cache=False).logits - whole)[:, -16:].abs().max() > 0.01


@pytest.mark.parametrize("tokens", [30, 199, 200, 260])
@pytest.mark.parametrize("beams", [1, 2])
def test_what_a_window_dropped_counts_in_a_static_batch(tokens, beams):
    """transformers makes the masks of several rows contiguous there; tokens come from before and behind the window."""
    model, ids = windowed(layers=2), prompt(tokens, 2)
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    with torch.inference_mode(), qaxis.sparse(model, 9, completion="linear"):
        whole = model.generate(ids, **options, use_cache=False)
        static = model.generate(ids, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(whole, static)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("tokens", [150, 199, 330])
@pytest.mark.parametrize("batch", [1, 2])
def test_what_a_window_dropped_counts_where_a_model_cuts_its_masks(batch, tokens, static):
    """Layers that share the keys of others get the last queries alone, and of their masks the last rows."""
    model, ids = sharing(), prompt(tokens, batch)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[1:, : tokens // 3] = 0
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cache = {"cache_implementation": "static", "disable_compile": True} if static else {}
    found = []
    for completion in ("linear", "none"):
        with torch.inference_mode(), qaxis.sparse(model, 9, completion=completion):
            one = model.generate(ids, **options, **cache)
            whole = model(one.sequences, attention_mask=F.pad(mask, (0, 12), value=1), use_cache=False)
        found.append(torch.stack(one.logits, 1))
        torch.testing.assert_close(found[-1], whole.logits[:, tokens - 1 : -1], rtol=1e-3, atol=1e-3)
    assert (found[0] - found[1]).abs().max() > 0.01


@pytest.mark.parametrize("completion", ["none", "linear"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [WINDOW - 1, WINDOW, WINDOW + 1, 260])
@torch.no_grad()
def test_a_model_that_cuts_its_masks_gives_the_logits_that_are_kept(tokens, batch, completion):
    """Of a whole text, too, of which no mask would be made; compiled layers give the same."""
    model, ids = sharing(), prompt(tokens, batch)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[1:, : tokens // 3] = 0
    with qaxis.sparse(model, 9, completion=completion):
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        for compiled in (False, True):
            if compiled:
                torch._dynamo.reset()
                for layer in model.model.layers:
                    layer.compile(backend="eager")
            for kept in (1, 5):
                for use_cache in (False, True):
                    found = model(ids, attention_mask=mask, use_cache=use_cache, logits_to_keep=kept).logits
                    torch.testing.assert_close(found, whole[:, -kept:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("build", [windowed, sharing])
@pytest.mark.parametrize("right", [False, True])
def test_a_model_with_windows_is_compiled(build, without_gradients, right):
    """Its masks are made outside of what is compiled, and tell there what they tell elsewhere."""
    torch._dynamo.reset()
    model, ids = build(), prompt(230, 2)
    options = {"attention_mask": torch.ones(2, 230, dtype=torch.long)} if right else {}
    if right:
        options["attention_mask"][1, 225:] = 0
    compiled = torch.compile(model, backend="eager")
    with without_gradients(), qaxis.sparse(model, 9, completion="linear"):
        eager = model(ids, **options)
        whole, found = compiled(ids, **options, use_cache=False), compiled(ids, **options)
        for output in (found, whole):
            torch.testing.assert_close(output.logits[:, :225], eager.logits[:, :225], rtol=1e-4, atol=1e-4)
        if not right:
            steps = [
                x(ids[:, :1], past_key_values=y.past_key_values).logits for x, y in ((model, eager), (compiled, found))
            ]
            torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ours", [False, True])
def test_padding_behind_a_window_is_a_range(ours):
    """What is no range of all queries, only of each, still tells what the window dropped."""
    model, ids, mask = windowed(), prompt(260, 2), torch.ones(2, 260, dtype=torch.long)
    mask[1, 257:] = 0
    cache = qaxis.Cache(model.config) if ours else DynamicCache(config=model.config)
    with torch.inference_mode(), qaxis.sparse(model, 9, completion="linear"):
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        model(ids[:, :250], past_key_values=cache)
        part = model(ids[:, 250:], attention_mask=mask, past_key_values=cache).logits
    for row, n in ((0, 10), (1, 7)):
        torch.testing.assert_close(part[row, :n], whole[row, 250 : 250 + n], rtol=1e-4, atol=1e-4)


def test_how_many_tokens_a_window_dropped_is_told_or_refused():
    model, ids = windowed(), prompt(260)
    mask = torch.ones(1, 1, 1, 200, dtype=torch.bool)
    assert dropped_before(None, None, 1, 500) == dropped_before(mask, None, 1, 500) == 0
    assert dropped_before(mask, 201, 1, 200) == dropped_before(None, 150, 200, 200) == 0
    for given in (None, mask):
        with pytest.raises(ValueError, match=r"attention_mask=.*dropped: completion"):
            dropped_before(given, 200, 1, 200)
    own, cache = torch.ones(1, 1, 1, 200, dtype=torch.bool), DynamicCache(config=model.config)
    with torch.inference_mode(), qaxis.sparse(model, 9, completion="mean"):
        # All of the text is there.
        model(ids, attention_mask=torch.ones(1, 1, 260, 260, dtype=torch.bool).tril(), use_cache=False)
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask='Tensor'.*completion"):
            model(ids[:, :1], attention_mask=own, past_key_values=cache)
        # Nothing but a completion asks for it.
        with qaxis.sparse(model, 9):
            model(ids[:, :1], attention_mask=own, past_key_values=cache)


def test_a_mask_that_is_no_range_is_refused_by_name(llama):
    mask = torch.ones(1, 1, 150, 150, dtype=torch.bool).tril()
    mask[..., 60] = False
    for exactness in qaxis.models.settings.EXACTNESS:
        options = {"exactness": exactness, "completion": "linear"}
        with torch.inference_mode(), qaxis.sparse(llama, FEW, **options):
            with pytest.raises(ValueError, match=r"attention_mask=.*hidden between visible ones.*completion"):
                llama(prompt(), attention_mask=mask, use_cache=False)
            # Of a dense layer nothing is left out.
            with qaxis.sparse(llama, "dense", **options):
                llama(prompt(), attention_mask=mask, use_cache=False)


@torch.inference_mode()
def test_dense_layers_ignore_it(llama):
    with qaxis.sparse(llama, "dense"):
        dense = llama(prompt()).logits
    with qaxis.sparse(llama, "dense", completion="linear", sinks=200):
        assert torch.equal(dense, llama(prompt()).logits)
    with qaxis.sparse(llama, FEW, first_dense=2, completion="mean"):
        assert torch.equal(dense, llama(prompt()).logits)
    with qaxis.sparse(llama, {0: "dense", "default": 9}, completion="mean"), qaxis.record(llama) as recording:
        llama(prompt())
    assert recording.layers[0].dense_calls == recording.layers[1].sparse_calls == 1


@pytest.mark.parametrize("always", [Always(), Always(2, 3)])
def test_dense_products_give_the_same_within_rounding(llama, always):
    ids, options = prompt(300), {"completion": "linear", **always._asdict()}
    found = []
    for exactness in ("auto", "selection"):
        with torch.inference_mode(), qaxis.sparse(llama, FEW, exactness=exactness, **options):
            found.append(llama(ids, use_cache=False).logits)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_names_and_room_are_checked(llama):
    for wrong in ("lines", "", None, 1, True):
        with pytest.raises(ValueError, match="completion=.*'none', 'mean' or 'linear'"):
            qaxis.enable(llama, FEW, completion=wrong)
    with pytest.raises(ValueError, match=r"sinks \+ recent=9: .*less than .* minimum 9: completion='mean'"):
        qaxis.enable(llama, FEW, sinks=4, recent=5, completion="mean")
    for options in ({"sinks": 4, "recent": 5}, {"sinks": 4, "recent": 4, "completion": "mean"}):
        with qaxis.sparse(llama, {0: "dense", "default": FEW}, **options):
            pass
    assert settings_of(llama.model.layers[0].self_attn) is None


def test_what_is_set_is_put_back_copied_and_pickled(llama):
    qaxis.enable(llama, FEW, completion="block")
    with qaxis.sparse(llama, FEW):
        assert settings_of(llama.model.layers[1].self_attn).completion == "none"
    for model in (llama, copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert [settings_of(layer.self_attn).completion for layer in model.model.layers] == ["linear"] * 2
    qaxis.disable(llama)


@pytest.mark.parametrize("kind", KINDS)
def test_ways_to_generate_agree(llama, kind):
    ids = prompt()
    with qaxis.sparse(llama, FEW, completion=kind):
        plain = llama.generate(ids, **GREEDY)
        for options in (
            {"past_key_values": DynamicCache(config=llama.config)},
            {"past_key_values": StaticCache(llama.config, max_cache_len=180)}, {"prompt_lookup_num_tokens": 3},
            {"past_key_values": qaxis.Cache(llama.config, index="bounds")},
        ):  # fmt: skip
            assert torch.equal(plain, llama.generate(ids, **GREEDY, **options))
        beams = [llama.generate(ids, num_beams=3, **GREEDY) for _ in range(2)]
        # 8 bits change numbers: the same way twice.
        codes = [llama.generate(ids, past_key_values=qaxis.Int8Cache(llama.config), **GREEDY) for _ in range(2)]
    assert torch.equal(*beams) and torch.equal(*codes)


# Which way it goes


def held(cache, layer=0):
    """Keys and values as a layer of a cache of ours hands them to attention."""
    kv = cache.layers[layer].kv
    k, v = kv.views() if isinstance(cache, qaxis.Cache) else cache.layers[layer].update(*none_of(kv), lazy=True)
    for x in (k, v):
        setattr(x, HOLDER, kv)
    return k, v


def none_of(kv):
    return [torch.zeros(kv.batch, kv.heads, 0, d, dtype=t) for d, t in zip(kv.dims, kv.dtypes, strict=True)]


def way(model, kind="linear", backend="cuda", tokens=1, cache=None, ids=None, **options):
    """How attention of the tokens after a prompt went, and what they gave."""
    ids = prompt(140) if ids is None else ids
    cache = qaxis.Cache(model.config, index="bounds") if cache is None else cache
    with torch.inference_mode():
        with qaxis.sparse(model, FEW, backend="reference", completion=kind):
            model(ids, past_key_values=cache)
        with qaxis.sparse(model, FEW, backend=backend, completion=kind, **options), qaxis.record(model) as recording:
            logits = model(ids[:, :tokens], past_key_values=cache).logits
    return set(recording.engines), logits


def test_refusals_are_told(llama):
    foreign = DynamicCache(config=llama.config)
    for expected, options in (
        (decoding.FOREIGN, {"cache": foreign}), (decoding.DRAFTED, {"tokens": 2}),
        (decoding.DRAFTED, {"tokens": 2, "cache": qaxis.Int8Cache(llama.config)}),
        (decoding.TRITON, {"backend": "triton"}), (Refusal("backend='reference'"), {"backend": "reference"}),
        (Refusal("there is no GPU"), {"backend": "auto"}),
    ):  # fmt: skip
        assert way(llama, **options)[0] == {f"canonical: {expected}"}
    # Whatever else is allowed to compute a token.
    assert way(llama, backend="triton", exactness="selection")[0] == {f"canonical: {decoding.TRITON}"}
    for n in (140, 230):
        for cache in (None, qaxis.Cache(llama.config, index="bounds")):
            assert way(windowed(), ids=prompt(n), cache=cache)[0] == {f"canonical: {decoding.WINDOW}"}


def rolled(model, calls, cache, parts, mask=None, crop=()):
    """Outputs of canonical attention, part by part; ``crop``: (part, tokens that are taken back before it)."""
    ids, n = prompt(sum(parts), 1 if mask is None else len(mask)), 0
    calls.clear()
    with torch.inference_mode(), qaxis.sparse(model, FEW, backend="reference", completion="linear"):
        for i, part in enumerate(parts):
            for back in (x for at, x in crop if at == i):
                cache.crop(-back)
                n -= back
            n += part
            model(ids[:, n - part : n], past_key_values=cache, attention_mask=None if mask is None else mask[:, :n])
    assert {x[3].engine for x in calls} == {"canonical"}
    return [x[3].output.clone() for x in calls]


def same_bits(x, y):
    return torch.equal(x.view(torch.int32), y.view(torch.int32))


@pytest.fixture
def kept(monkeypatch):
    """Which groups each call finds kept, None where none are; while ``nothing`` is in the list none are."""
    found, real = [], routing._kept

    def spy(*args):
        moments = None if found[:1] == ["nothing"] else real(*args)
        found.append(moments and moments.groups)
        return moments

    monkeypatch.setattr(routing, "_kept", spy)
    return found


#: of two rows the second one begins with padding
PADDED = torch.ones(2, 400, dtype=torch.long)
PADDED[1, :60] = 0
CACHES = {
    "in full": lambda config: qaxis.Cache(config, index="bounds"), "int8": qaxis.Int8Cache,
    "int4": lambda config: qaxis.Int8Cache(config, format="int4"),
}  # fmt: skip


@pytest.mark.parametrize("mask", [None, PADDED], ids=["one", "padded"])
@pytest.mark.parametrize("made", CACHES)
def test_canonical_tokens_take_the_moments_that_a_cache_keeps(llama, calls, kept, monkeypatch, made, mask):
    """As if each summed all groups anew: across one that becomes complete, is cropped and comes again."""
    summed, add_groups = [], completed.add_groups
    monkeypatch.setattr(completed, "add_groups", lambda *args: summed.append(1) or add_groups(*args))
    parts, found = (253, *[1] * 11, 100, 1, 1), []
    for before in ((), ("nothing",)):
        kept[:] = before
        summed.clear()
        cache = CACHES[made](llama.config)
        found.append(rolled(llama, calls, cache, parts, mask, ((7, 6), (13, 20))))
        # Of a prompt and a chunk what their queries see, in two layers and KV heads; of the second row less.
        of_prompts = 2 * 2 * (1 + 2 + (0 if mask is None else 1))
        assert (len(summed) > of_prompts) if before else (len(summed) == of_prompts)
    assert len(found[0]) == 2 * len(parts) and all(map(same_bits, *found))


@pytest.mark.parametrize("made", CACHES)
def test_rows_that_change_places_take_their_moments_along(llama, calls, kept, made):
    found, ids = [], prompt(300, 2)
    for before in ((), ("nothing",)):
        kept[:] = before
        calls.clear()
        cache, mask = CACHES[made](llama.config), PADDED
        with torch.inference_mode(), qaxis.sparse(llama, FEW, backend="reference", completion="linear"):
            llama(ids, past_key_values=cache, attention_mask=mask[:, :300])
            for n in (301, 302, 303):
                llama(ids[:, :1], past_key_values=cache, attention_mask=mask[:, :n])
                cache.reorder_cache(torch.tensor([1, 0]))
                mask = mask.flip(0)
        found.append([x[3].output for x in calls])
        assert before or kept == [None] * 2 + [[(0, 2), (1, 2)]] * 2 + [[(1, 2), (0, 2)]] * 2 + [[(0, 2), (1, 2)]] * 2
    assert all(map(same_bits, *found))


@pytest.mark.parametrize("rows", ["drafted", "hidden at the end", "a window", "a window over all keys"])
def test_who_sees_other_groups_than_are_kept_sums_them(llama, calls, kept, rows):
    """Tokens that are drafted across the end of a group, rows that end before it, and windows."""
    model, parts, mask = llama, (250, 12, 1), None
    expected = [None] + [[(0, 2)]] * 2
    if rows == "hidden at the end":
        mask = torch.ones(2, 400, dtype=torch.long)
        mask[1, 250:] = 0
        expected = [None] + [[(0, 2), (0, 2)]] * 2
    unwindowed = copy.deepcopy(windowed().config)
    unwindowed.sliding_window, unwindowed.layer_types = None, ["full_attention"]
    if "window" in rows:
        model, parts = windowed(), (325, 2, 1, 1, 50, 5, 1)
        expected = [None] * 7
    if rows == "a window over all keys":
        expected = [None, [(1, 2)], [(1, 2)], [(2, 2)], None, [(2, 3)], [(2, 3)]]
    found = []
    for before in ((), ("nothing",)):
        kept[:] = before
        cache = qaxis.Cache(unwindowed if rows == "a window over all keys" else model.config)
        found.append(rolled(model, calls, cache, parts, mask))
        assert before or kept[:: len(kept) // len(parts)] == expected
    assert all(map(same_bits, *found))


def test_keys_of_an_earlier_token_have_other_moments(llama):
    """What is kept is of more groups by then."""
    cache = qaxis.Cache(llama.config)
    with torch.inference_mode():
        llama(prompt(250), past_key_values=cache)
        k, v = held(cache)
        q, settings = torch.randn(1, 6, 1, 16), Settings(FEW, backend="reference", completion="linear")
        everything = torch.ones(1, 1, 1, 250, dtype=torch.bool)
        found = [routing.attend(q, k, v, Shown(), lambda: everything, Logits(0.25), settings).output]
        llama(prompt(10), past_key_values=cache)
        found += [routing.attend(q, k, v, Shown(), lambda: everything, Logits(0.25), settings).output]
    assert same_bits(*found) and cache.layers[0].kv.length == 260


def test_where_no_step_runs_attention_is_canonical(llama, monkeypatch):
    class Nothing:
        def engine(self, *args, completion, **kwargs):
            raise RuntimeError(f"completion={completion!r}: no step")

    monkeypatch.setattr(decoding, "_decoder", lambda *args: Nothing())
    assert way(llama)[0] == {"canonical: completion='linear': no step"}


def test_strict_mode_refuses_what_nobody_asked_for(llama):
    module, strict = llama.model.layers[1].self_attn, Settings(strict=True, completion="mean")
    for refusal in (decoding.FOREIGN, decoding.DRAFTED, decoding.WINDOW):
        with pytest.raises(RuntimeError, match=f"layer 1: canonical attention, as {refusal}"):
            attention._check_strict(module, Attended(torch.zeros(1), None, "canonical", (refusal,)), strict)
    for refusal in (decoding.TRITON, decoding.CODES, TOLERANCE):
        attention._check_strict(module, Attended(torch.zeros(1), None, "canonical", (refusal,)), strict)


@pytest.fixture
def strictly(monkeypatch):
    """Strict mode, which looks at tensors on a GPU alone, looks at these."""
    module, attend = torch.nn.Module(), routing.attend

    def strict(q, k, v, shown, allowed, logits, settings, *rest):
        done = attend(q, k, v, shown, allowed, logits, settings, *rest)
        attention._check_strict(module, done, dataclasses.replace(settings, strict=True))
        return done

    monkeypatch.setattr(routing, "attend", strict)


#: of caches that a step reads, and others
STEP_CACHES = {
    "codes": lambda config: qaxis.Cache(config),
    "bounds": lambda config: qaxis.Cache(config, index="bounds"),
    "int6": lambda config: qaxis.Int8Cache(config, format="int6"),
    "dynamic": lambda config: DynamicCache(config=config),
}


def engines_of(engines):
    return {engine.split(":")[0] for engine in engines}


@pytest.mark.parametrize("tokens, backend", [(1, "cuda"), (3, "cuda"), (16, "cuda"), (1, "triton"), (3, "triton")])
@pytest.mark.parametrize("name", STEP_CACHES)
def test_where_no_group_is_complete_strict_mode_has_nothing_to_refuse(strictly, monkeypatch, name, tokens, backend):
    """Of 127 keys nothing is put back, so they go as without a completion; of one more that is for a step to do."""
    monkeypatch.setattr(decoding, "PLACES", 128)
    model, options = windowed(None), {"kind": "linear", "tokens": tokens, "ids": prompt(127 - tokens)}
    engines, found = way(model, backend=backend, cache=STEP_CACHES[name](model.config), **options)
    assert engines_of(engines) == {backend}
    for kind in ("none", "linear"):
        options["kind"] = kind
        canonical = way(model, backend="reference", cache=STEP_CACHES[name](model.config), **options)[1]
        assert torch.equal(found, canonical)
    options |= {"ids": prompt(128 - tokens), "cache": STEP_CACHES[name](model.config), "backend": backend}
    if name == "dynamic" or tokens > 1:
        why = decoding.FOREIGN if name == "dynamic" else decoding.DRAFTED
        with pytest.raises(RuntimeError, match=f"canonical attention, as {why} .strict=True."):
            way(model, **options)
    else:
        asked = {f"canonical: {decoding.TRITON}"}
        engines, _ = way(model, **options)
        assert engines == asked if backend == "triton" else engines_of(engines) == {"cuda"}


@pytest.mark.parametrize("tokens", [1, 3])
def test_eight_bits_of_less_than_a_group_go_as_without_a_completion(strictly, tokens):
    """Several tokens over them are no step, but a prompt."""
    model, found = windowed(None), []
    for kind in ("none", "linear"):
        options = {"tokens": tokens, "ids": prompt(90), "exactness": "selection", "backend": "triton"}
        engines, logits = way(model, kind=kind, cache=qaxis.Int8Cache(model.config), **options)
        assert engines_of(engines) == {"triton" if tokens == 1 else "prefill"}
        found.append(logits)
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("kind", ["ours", "sibling", "dynamic"])
def test_a_window_without_room_for_a_group_puts_nothing_back(strictly, monkeypatch, kind, backend):
    """However many tokens there are; a window of 128 keys may hold a group."""
    monkeypatch.setattr(decoding, "PLACES", 128)

    def go(window, backend):
        model = windowed(window)
        config = copy.deepcopy(model.config)
        if kind == "sibling":
            config.sliding_window, config.layer_types = None, ["full_attention"]
        cache = DynamicCache(config=config) if kind == "dynamic" else qaxis.Cache(config)
        return way(model, backend=backend, cache=cache, ids=prompt(260))

    for window in (100, 127):
        engines, found = go(window, backend)
        assert engines_of(engines) == {backend} and torch.equal(found, go(window, "reference")[1])
    with pytest.raises(RuntimeError, match="canonical attention, as a completion (in a window|of keys)"):
        go(128, backend)


def test_a_step_that_can_complete_asks_for_moments_before_there_is_a_group():
    """The first that has one may be captured, when it is too late to make them."""
    model = windowed(None)
    cache = qaxis.Cache(model.config, index="bounds")
    way(model, cache=cache, ids=prompt(100))
    assert cache.layers[0].kv.summary.moments is not None


def test_what_is_no_step_is_not_captured(llama):
    cache = qaxis.Cache(llama.config)
    with torch.inference_mode(), qaxis.sparse(llama, FEW, backend="cuda", completion="mean"):
        llama(prompt(140), past_key_values=cache)
        with pytest.raises(RuntimeError, match="no step that can be repeated: a completion of several queries"):
            with routing.only_steps():
                llama(prompt(2), past_key_values=cache)
    model = windowed()
    for kind, expected in (("none", ""), ("mean", "a completion in a window is no step")):
        with torch.inference_mode(), qaxis.sparse(model, FEW, completion=kind):
            cache = qaxis.Cache(model.config)
            model(prompt(20), past_key_values=cache)
            kwargs = {"input_ids": prompt(1), "position_ids": torch.tensor([[20]]), "past_key_values": cache}
            assert replaying.Replaying(model, model.forward, None)._refusal((), kwargs) == expected


class Step:
    """In the place of a decoder: canonical sums, if the moments that it is given are those of what the rows see."""

    def engine(self, q, k, v, index, always, logits, completion="none"):
        return "cuda", ""

    def run(self, q, k, v, index, rows, logits, always, completion="none", moments=None):
        from qaxis.attention import backend
        from qaxis.storage.moments import add_groups, empty

        place = torch.arange(k.shape[2])
        allowed = ((place >= rows[:, :1]) & (place < rows[:, 1:2]))[:, None, None]
        indices = backend.select(q, k, allowed, rows[:, 2, None, None].long(), always=always)
        for row, (begin, end) in enumerate(rows[:, :2].tolist()):
            one = [x[row : row + 1] for x in (k, v)]
            expected = add_groups(empty(*one), *one, -(-begin // 128), end // 128)
            assert all(torch.equal(x[row : row + 1], y) for x, y in zip(moments, expected, strict=True))
        out = completed.attend(q, k, v, indices, logits, completion, seen_of(allowed))
        from qaxis.decode.triton_step import Step as Result

        return Result(out, indices, torch.zeros(1))


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_what_a_token_sees(llama, monkeypatch, kind):
    """A padded batch whose rows change places: every token as canonical attention has it."""
    monkeypatch.setattr(decoding, "_decoder", lambda *args: Step())
    ids, mask = prompt(254, 2), torch.ones(2, 262, dtype=torch.long)
    mask[1, :60] = 0
    found = {}
    for backend in ("reference", "cuda"):
        cache = qaxis.Cache(llama.config, index="bounds")
        with torch.inference_mode(), qaxis.sparse(llama, FEW, backend="reference", completion=kind):
            llama(ids, attention_mask=mask[:, :254], past_key_values=cache)
        with torch.inference_mode(), qaxis.sparse(llama, FEW, backend=backend, completion=kind):
            for i in range(254, 262):
                rows = mask.flip(0) if i > 257 else mask
                if i == 258:
                    cache.reorder_cache(torch.tensor([1, 0]))
                if i == 260:
                    cache.crop(-2)
                out = llama(
                    ids[:, :1] + i - 254, attention_mask=rows[:, : cache.get_seq_length() + 1], past_key_values=cache
                )
                found.setdefault(backend, []).append(out.logits)
    assert all(map(torch.equal, *found.values()))


def test_while_a_step_is_captured_the_pads_are_the_graphs(llama, monkeypatch):
    asked = []
    monkeypatch.setattr(decoding, "_decoder", lambda *args: Step())
    cache, pads = qaxis.Cache(llama.config, index="bounds"), torch.tensor([7], dtype=torch.int32)
    with torch.inference_mode():
        llama(prompt(150), past_key_values=cache)
        kv, q = cache.layers[0].kv, torch.randn(1, 6, 1, 16)
        moments = kv.moments
        monkeypatch.setattr(kv, "moments", lambda pads: asked.append(pads) or moments(pads))
        cache.shared.pads = pads
        settings = Settings(FEW, backend="cuda", completion="mean")
        decoding.attend(q, *held(cache), Shown(), Logits(0.25), settings)
        with decoding.rows_into(cache.shared, object()):
            decoding.attend(q, *held(cache), Shown(), Logits(0.25), settings)
    assert asked[0] is None and asked[1] is pads


@pytest.fixture
def replayed(llama, monkeypatch):
    """As in test_replaying.py, with a completion in the graph and in the model."""
    monkeypatch.setattr(replaying, "CapturedStep", test_replaying.Graph)
    monkeypatch.setattr(replaying, "LEAST", 8)
    monkeypatch.setattr(generation, "replaying", test_replaying.without_gpu())
    model = copy.deepcopy(llama)
    test_replaying.Graph.model, test_replaying.Graph.made = copy.deepcopy(llama), []
    return model


@pytest.mark.parametrize("kind", ["none", "linear"])
def test_tokens_are_replays_once_two_were_proven(replayed, monkeypatch, kind):
    """A graph that completes stands for a model that does, and for no other: the two tokens run both ways differ."""
    enable = qaxis.enable
    monkeypatch.setattr(
        qaxis, "enable", lambda model, *args, **options: enable(model, *args, completion="linear", **options)
    )
    enable(replayed, Budget(0.2, 5), backend="reference", completion=kind)
    out = replayed.generate(prompt(140), **{**GREEDY, "max_new_tokens": 12, "min_new_tokens": 12})
    replays = [graph.replays for graph in test_replaying.Graph.made]
    enable(replayed, Budget(0.2, 5), backend="reference", completion=kind)
    monkeypatch.setattr(replaying, "WARM", 10**9)
    eager = replayed.generate(prompt(140), **{**GREEDY, "max_new_tokens": 12, "min_new_tokens": 12})
    assert torch.equal(out, eager) and replays == ([1] if kind == "none" else [9])


def as_placed(done, q, k, v, settings, logits):
    """What a step over codes means, of the places that it left in its work space."""
    holder = getattr(k, HOLDER)
    (decoder,) = (x for x in holder.shared.workspace.values() if isinstance(x, Decoder))
    (rows,) = (x.tensor for x in holder.shared.workspace.values() if isinstance(x, decoding._Rows))
    (step,) = (x for shape, x in decoder.steps.items() if shape.completed)
    kept = done.kept()
    return places.attend(
        q, *(dequantized(x) if isinstance(x, Stored) else x for x in holder.operands()[:2]),
        mask_to_indices(kept, int(kept.sum(-1).max())), rows, step.buffers.fast, step.buffers.units, logits,
        settings.completion, in_full=holder.operands()[2].codes.first.shape[2],
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", ["codes", "bounds", "int8"])
def test_steps_complete_what_they_leave_out(kind, index, monkeypatch):
    """In CUDA C++, emulated, a padded batch: over bounds canonical bits; over codes those of its places, close by."""
    attend, meant = decoding.attend, []

    def spy(q, k, v, shown, logits, settings):
        done = attend(q, k, v, shown, logits, settings)
        if index != "bounds":
            meant.append(torch.equal(done.output, as_placed(done, q, k, v, settings, logits)))
        return done

    monkeypatch.setattr(decoding, "attend", spy)
    model = wide(torch.bfloat16 if index == "int8" else torch.float32)
    ids, mask = prompt(268, 2), torch.ones(2, 270, dtype=torch.long)
    mask[1, :7] = 0
    found = {}
    for backend in ("reference", "cuda"):
        cache = qaxis.Int8Cache(model.config) if index == "int8" else qaxis.Cache(model.config, index=index)
        with torch.inference_mode():
            with qaxis.sparse(model, FEW, backend="reference", completion=kind):
                model(ids, attention_mask=mask[:, :268], past_key_values=cache)
            with qaxis.sparse(model, FEW, backend=backend, completion=kind), qaxis.record(model) as recording:
                for i in (268, 269):
                    out = model(ids[:, :1], attention_mask=mask[:, : i + 1], past_key_values=cache)
                    found.setdefault(backend, []).append(out.logits)
    assert set(recording.engines) == {"cuda"} and meant == [True] * (0 if index == "bounds" else 2)
    if index == "bounds":
        assert all(map(torch.equal, *found.values()))
    else:
        for x, y in zip(*found.values(), strict=True):
            assert (x.float() - y.float()).norm() < (2e-2 if index == "int8" else 2e-3) * y.float().norm()


def test_capped_logits_and_layers_with_and_without_a_window():
    """Gemma 2: a token of a layer with a window is canonical, one of the others a step, both with the same bits."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=64, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=150, query_pre_attn_scalar=64, initializer_range=0.3,
    )  # fmt: skip
    model, ids, found = Gemma2ForCausalLM(config).eval(), prompt(262), []
    for backend in ("reference", "cuda"):
        cache = qaxis.Cache(config, index="bounds")
        with torch.inference_mode():
            with qaxis.sparse(model, FEW, backend="reference", sinks=2, recent=3, completion="linear"):
                model(ids, past_key_values=cache)
            with qaxis.sparse(model, FEW, backend=backend, sinks=2, recent=3, completion="linear"):
                with qaxis.record(model) as recording:
                    found.append([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(2)])
    assert recording.engines == {"cuda": 2, f"canonical: {decoding.WINDOW}": 2}
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("kind", KINDS)
def test_generate_over_emulated_steps(kind):
    """Tokens, beams that change places and drafts that are taken back, over every index: those of the reference."""
    model, ids = wide(), prompt(124)
    options = {**GREEDY, "max_new_tokens": 8, "min_new_tokens": 8}
    for cache in (lambda: qaxis.Cache(model.config, index="bounds"), lambda: qaxis.Cache(model.config)):
        found = {}
        for backend in ("reference", "cuda"):
            with qaxis.sparse(model, FEW, backend=backend, completion=kind):
                found[backend] = [
                    model.generate(ids, past_key_values=cache(), **options, **more)
                    for more in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3})
                ]
        assert all(map(torch.equal, *found.values()))
    model = wide(torch.bfloat16)
    with qaxis.sparse(model, FEW, backend="cuda", completion=kind), qaxis.record(model) as recording:
        out = model.generate(
            ids, past_key_values=qaxis.Int8Cache(model.config), **options, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert all(x.isfinite().all() for x in out.logits)
    assert recording.engines["cuda"] == 7


def test_bitwise_takes_no_step_over_codes():
    model = wide()
    for exactness, expected in (("auto", "cuda"), ("bitwise", f"canonical: {decoding.CODES}")):
        for cache in (qaxis.Cache(model.config), qaxis.Cache(model.config, index="bounds")):
            coded = cache.layers[0].index == "codes"
            assert way(model, cache=cache, exactness=exactness)[0] == {expected if coded else "cuda"}
    assert way(wide(torch.bfloat16), cache=qaxis.Int8Cache(model.config), exactness="bitwise")[0] == {
        f"canonical: {decoding.CODES}"
    }


def test_what_the_step_cannot_read_is_canonical():
    """8-bit caches of float32, which only Triton's step reads, and scales that leave float32."""
    model = wide()
    (engine,), _ = way(model, cache=qaxis.Int8Cache(model.config))
    assert engine.startswith("canonical: no decode step runs here: keys and values are not two caches of 8 bits")
    cache = qaxis.Cache(model.config, index="bounds")
    with torch.inference_mode():
        model(prompt(140), past_key_values=cache)
        k, v = held(cache)
        settings = Settings(FEW, backend="cuda", completion="mean")
        why = decoding.refusal(torch.zeros(1, 2, 1, 64), k, v, Shown(), Logits(1e-35), settings)
    assert why.canonical and "scaled by less" in str(why)


def test_a_compiled_step_completes():
    """Its attention is the opaque operation, which appends, brings the moments up to date and runs the step."""
    model, ids = wide(layers=2), prompt(127)
    qaxis.enable(model, FEW, backend="cuda", completion="linear")
    compiled = CompiledForward(model.forward)
    compiled.forward = torch.compile(model.forward, dynamic=False, fullgraph=True, backend="aot_eager")
    found = []
    with torch.no_grad():
        for step in (None, compiled):
            cache, logits = qaxis.Cache(model.config, index="bounds"), []
            model(ids, past_key_values=cache)
            replays = replaying.Replaying(model, model.forward, step)
            for i in range(127, 130):
                kwargs = {"input_ids": ids[:, i - 127, None], "position_ids": torch.tensor([[i]]), "return_dict": True}
                kwargs |= {"past_key_values": cache, "attention_mask": None}
                # The first goes as it is: it tells what a token sees, and asks for the moments.
                whole = step is None or i == 127
                logits.append((model(**kwargs) if whole else replays._compiled(None, **kwargs)).logits)
            found.append(logits)
    assert all(map(torch.equal, *found))


# ---- budgets with a tolerance --------------------------------------------------------------------------------------

SHARE = Budget(0, 1, tolerance=0.05)


@pytest.mark.parametrize(
    "kind, backend, n",
    [("none", "auto", 140), ("linear", "auto", 140), ("linear", "cuda", 140), ("none", "triton", 24)],
)
@torch.inference_mode()
def test_each_head_and_token_keeps_what_a_tolerance_needs(calls, kind, backend, n):
    """A prompt, a token and drafted tokens over codes: the keys of the public call, in its bits."""
    model, ids = wide(), prompt(n + 5)
    cache = qaxis.Int8Cache(model.config)
    with (
        qaxis.sparse(model, {0: SHARE}, backend=backend, completion=kind),
        qaxis.record(model, masks=True) as recording,
    ):
        for part in (ids[:, :n], ids[:, n : n + 1], ids[:, n + 1 :]):
            model(part, past_key_values=cache)
    assert set(recording.engines) == {"canonical: a budget with a tolerance"} and len(calls) == 3
    kept = 0
    for (q, k, v, done), mask in zip(calls, recording.layers[0].masks, strict=True):
        keys, values = (dequantized(x) if isinstance(x, Stored) else x for x in map(stored_or_tensor, (k, v)))
        expected = qaxis.topk_attention(q, keys, values, SHARE, completion=kind)
        assert torch.equal(done.output, expected.output)
        assert torch.equal(mask, indices_to_mask(expected.indices, keys.shape[2]))
        kept = kept + mask.sum((0, 2, 3)).double()
    per_head = recording.layers[0].k_eff
    assert torch.equal(per_head, kept / (n + 5)) and float(per_head[0]) != float(per_head[1])
    assert f"{float(per_head.mean()):8.1f} " in recording.summary().splitlines()[1]


@torch.inference_mode()
def test_dense_products_keep_to_a_tolerance_too(calls):
    for kind in ("none", "linear"):
        found, model = [], wide()
        for exactness in ("auto", "selection"):
            with (
                qaxis.sparse(model, SHARE, exactness=exactness, backend="cuda", completion=kind),
                qaxis.record(model, masks=True) as recording,
            ):
                cache = qaxis.Cache(model.config)
                out = [model(ids, past_key_values=cache).logits for ids in (prompt(140), prompt(1))]
            engine = "masked" if exactness == "selection" else "canonical"
            assert set(recording.engines) == {f"{engine}: a budget with a tolerance"}
            found.append((out, recording.layers[0].masks))
        assert all(map(torch.equal, found[0][1], found[1][1]))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_a_token_with_a_tolerance_is_not_captured(llama):
    for budget, expected in ((FEW, ""), ({0: FEW, 1: SHARE}, "a budget with a tolerance is no step")):
        with qaxis.sparse(llama, budget, backend="cuda"):
            cache = qaxis.Cache(llama.config)
            llama(prompt(20), past_key_values=cache)
            kwargs = {"input_ids": prompt(1), "position_ids": torch.tensor([[20]]), "past_key_values": cache}
            assert replaying.Replaying(llama, llama.forward, None)._refusal((), kwargs) == expected
    with qaxis.sparse(llama, SHARE, backend="cuda"), routing.only_steps():
        with pytest.raises(RuntimeError, match="no step that can be repeated: a budget with a tolerance"):
            llama(prompt(1), past_key_values=cache)

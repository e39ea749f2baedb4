"""A second model with real weights, optional: three layers of eighteen see every token, the others 512."""

from __future__ import annotations

from typing import Any

import torch

import qaxis

from ..harness.claim import Context, NotRunError, Result, value
from ..inputs import optional
from ..inputs.subjects import documents, load_model, texts_of

#: more than the window of its local layers
TOKENS, NEW = 640, 8
#: last tokens whose logits are compared: of all of them, with 262,144 entries each, there would be half a gigabyte
LAST = 32
#: of the largest logit, which rounding accounts for, as for the families
CLOSE = 1e-4
#: a perplexity that a model which was loaded wrongly does not have
SANE = 60.0


@torch.inference_mode()
def gemma(context: Context) -> Result:
    """Off is stock; with every key kept, prompt and generation are those of eager attention; its text is sane."""
    subject = optional.subjects()["gemma"]
    if optional.missing(subject):
        raise NotRunError(f"{subject['name']} is optional and not installed; {optional.advice(subject)}")
    with optional.joined(subject) as path:
        model, tokenizer, _ = load_model(str(path), context.device)
    tokens = 544 if context.quick else TOKENS
    (ids,) = texts_of(tokenizer, documents(context.corpus_name)[0], context.device, 1, tokens)
    return measured(model, ids, subject["sha256"], NEW)


def measured(model: Any, ids: torch.Tensor, digest: str, new: int) -> Result:
    """``ids [1, N]``: a text of more tokens than the local layers see."""
    model.set_attn_implementation("eager")
    off = off_difference(model, ids)
    between, dense, ppl = every_key(model, ids)
    decode = chunks(model, ids)
    same = generation(model, ids, new)
    window = model.config.sliding_window
    passed = off == between == 0 and max(dense, decode) <= CLOSE and same == new and ppl < SANE
    return Result(
        passed=passed and ids.shape[1] > window,
        verdict="stock when off, eager when every key is kept"
        if passed
        else f"off {off:g}, every key {between:g} and {dense:g}, chunks {decode:g}, {same} of {new} tokens, "
        f"perplexity {ppl:.0f}",
        headline=f"off max|dlogit| = {off:g}; every key kept: {dense:.1e} of the largest logit, {same} of {new} tokens",
        values={
            "tokens": value(ids.shape[1], "tokens"),
            "window": value(window, "tokens"),
            "off": value(off, "logits"),
            "every_key": value(between, "logits"),
            "dense": value(dense, "of the largest logit"),
            "decode": value(decode, "of the largest logit"),
            "same": value(same, "tokens", n=new),
            "perplexity": value(ppl, ""),
        },
        cases=5,
        data={"sha256": digest},
        checks=["off", "every key", "chunks", "generation", "text"],
    )  # fmt: skip


def _logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model(ids, logits_to_keep=LAST, **options).logits


def off_difference(model: Any, ids: torch.Tensor) -> float:
    """max|dlogit| of the stock model against itself after enable and disable; inf if enabling changes nothing."""
    stock = _logits(model, ids)
    with qaxis.sparse(model, qaxis.Budget(0.1)):
        if torch.equal(stock, _logits(model, ids)):
            return float("inf")
    qaxis.disable(qaxis.enable(model, 64, strict=True))
    return float((stock - _logits(model, ids)).abs().max())


def every_key(model: Any, ids: torch.Tensor) -> tuple[float, float, float]:
    """(max|dlogit| among budgets that keep every key, relative distance from eager, perplexity of the last tokens)."""
    eager, kept = _logits(model, ids), list[torch.Tensor]()
    for budget in (qaxis.Budget(1.0, 1), 10 * ids.shape[1]):
        with qaxis.sparse(model, budget, strict=True):
            kept.append(_logits(model, ids))
    loss = torch.nn.functional.cross_entropy(eager[0, :-1].float(), ids[0, 1 - LAST :])
    return float((kept[0] - kept[1]).abs().max()), _relative(kept[0], eager), float(loss.exp())


def chunks(model: Any, ids: torch.Tensor) -> float:
    """Relative distance of a prompt in two chunks and single tokens from one prompt, with a tenth of the keys."""
    first, single = ids.shape[1] - LAST, 4
    with qaxis.sparse(model, qaxis.Budget(0.1)):
        whole = _logits(model, ids)
        cache = model(ids[:, :first], use_cache=True, logits_to_keep=1).past_key_values
        parts = [model(ids[:, first:-single], past_key_values=cache).logits]
        parts += [model(one, past_key_values=cache).logits for one in ids[:, -single:].split(1, 1)]
    return _relative(torch.cat(parts, 1), whole)


def generation(model: Any, ids: torch.Tensor, new: int) -> int:
    """Greedy tokens of ``generate``, with the cache that it takes by default, before the first that is not eager's."""
    greedy = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    eager = model.generate(ids, attention_mask=mask, **greedy)[0, -new:]
    with qaxis.sparse(model, qaxis.Budget(1.0, 1), strict=True):
        kept = model.generate(ids, attention_mask=mask, **greedy)[0, -new:]
    return int((eager == kept).cumprod(0).sum())


def _relative(x: torch.Tensor, right: torch.Tensor) -> float:
    return float((x - right).abs().max() / right.abs().max())

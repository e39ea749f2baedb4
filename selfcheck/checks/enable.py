"""``qaxis.enable(model, budget)`` as the README writes it, on a model of 32 heads: long prompts and what follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

import qaxis

from ..harness.claim import Context, NotRunError, Result, value
from ..inputs import random_llama
from ..inputs.capture import Captured, watched
from .doors import NEAR

#: prompt lengths, and how many tokens follow
LENGTHS = {1024: 8, 2048: 8, 4096: 8, 8192: 64, 16384: 8}
#: what stands after the model in the call; () is the default budget
CALLS: dict[str, tuple[qaxis.Budget, ...]] = {
    "enable(model, Budget(coverage=0.1, minimum=64))": (qaxis.Budget(coverage=0.1, minimum=64),),
    "enable(model)": (),
}
#: what ``generate`` is given as ``past_key_values``: nothing, and what the README's example gives it
CACHES: dict[str, Callable[[Any], Any] | None] = {"": None, "Int8Cache": lambda model: qaxis.Int8Cache(model.config)}
#: query rows of the prompt that are compared: so many from the beginning, the middle and the end
ROWS = 4
#: the layer that is looked at
LAYER = 1


class Found(NamedTuple):
    """Rows of the prompt, those whose output is beyond the bound, and those with the bits of the reference; tokens that
    followed, and those whose logits are not the canonical ones bit for bit."""

    rows: int
    wrong: int
    equal: int
    tokens: int
    differ: int


class _Prompt:
    """Compares what attention gave for the prompt with the reference, while the model runs."""

    def __init__(self, budget: qaxis.Budget) -> None:
        self.budget, self.rows, self.wrong, self.equal = budget, 0, 0, 0

    def __call__(self, seen: Captured, output: torch.Tensor) -> None:
        if seen.layer != LAYER:
            return
        m, n = seen.q.shape[2], seen.k.shape[2]
        for start in {0, (m - ROWS) // 2, m - ROWS}:
            visible = n - m + start + ROWS
            right = qaxis.topk_attention(
                seen.q[:, :, start : start + ROWS], seen.k[:, :, :visible], seen.v[:, :, :visible], self.budget,
                backend="reference",
            ).output.transpose(1, 2)  # fmt: skip
            found = output[:, start : start + ROWS]
            off = (right.float() - found.float()).abs().amax(-1) / seen.v.float().abs().max()
            self.rows += off.numel()
            self.wrong += int((off > NEAR).sum())
            self.equal += int((right == found).all(-1).sum())


def prompt_of(model: Any, tokens: int, seed: int) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(seed + tokens)
    return torch.randint(3, model.config.vocab_size, (1, tokens), generator=numbers).to(model.device)


def compared(
    model: Any, ids: torch.Tensor, new: int, arguments: tuple[qaxis.Budget, ...], make: Callable[[Any], Any] | None
) -> Found:
    """The call as written, then ``generate``; the same prompt again, looked at; and its tokens, one by one, by the
    reference, which scores every key canonically in PyTorch and knows no graph."""
    greedy = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    kept = {"output_logits": True, "return_dict_in_generate": True}
    mask, looked = torch.ones_like(ids), _Prompt(arguments[0] if arguments else qaxis.Budget())
    qaxis.enable(model, *arguments)
    try:
        given = {} if make is None else {"past_key_values": make(model)}
        out = model.generate(ids, attention_mask=mask, **given, **greedy, **kept)
        cache = DynamicCache(config=model.config) if make is None else make(model)
        with watched("qaxis", looked):
            logits = [model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]]
        with qaxis.sparse(model, *arguments, backend="reference"):
            for i in range(ids.shape[1], ids.shape[1] + new - 1):
                logits.append(model(out.sequences[:, i : i + 1], past_key_values=cache).logits[:, -1])
    finally:
        qaxis.disable(model)
    if len(out.logits) != new or not looked.rows:
        raise AssertionError(f"{len(out.logits)} tokens generated, {looked.rows} rows seen")
    differ = sum(not torch.equal(a, b.float()) for a, b in zip(out.logits, logits, strict=True))
    return Found(looked.rows, looked.wrong, looked.equal, new, differ)


@torch.inference_mode()
def as_documented(context: Context) -> Result:
    """Prompts and generated tokens: it runs, prompts are within the bound, and tokens have canonical bits."""
    if context.device == "cpu":
        raise NotRunError("this claim needs a GPU (--device cuda)")
    model = random_llama.build(context.device, layers=2, head_dim=128, hidden=4096, intermediate=4096)
    lengths = dict(list(LENGTHS.items())[:2]) if context.quick else LENGTHS
    return measured(context, model, lengths)


def measured(context: Context, model: Any, lengths: dict[int, int]) -> Result:
    """``lengths``: tokens of the prompt, and how many follow."""
    plan = [(tokens, call, cache) for tokens in lengths for call in CALLS for cache in CACHES]
    failures: list[str] = []
    found: list[Found] = []
    for tokens, call, cache in context.progress(plan, "prompts"):
        name = f"{call}{', ' * bool(cache)}{cache}, {tokens} tokens"
        ids = prompt_of(model, tokens, context.seed)
        try:
            one = compared(model, ids, lengths[tokens], CALLS[call], CACHES[cache])
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}"[:300])
            continue
        found.append(one)
        if one.wrong or one.differ:
            failures.append(f"{name}: {one.wrong} of {one.rows} rows, {one.differ} of {one.tokens} tokens differ")
    total = Found(*map(sum, zip(*found, strict=True))) if found else Found(0, 0, 0, 0, 0)
    return Result(
        passed=not failures,
        verdict=failures[0] if failures else "it runs, rows are those of the reference, tokens have its bits",
        headline=f"{len(plan) - len(failures)} of {len(plan)} prompts right, {total.wrong} of {total.rows} rows and "
        f"{total.differ} of {total.tokens} tokens differ",
        values={
            "prompts": value(len(plan), "prompts"),
            "failed": value(len(failures), "prompts", n=len(plan)),
            "rows": value(total.rows, "rows"),
            "wrong": value(total.wrong, "rows", n=total.rows),
            "equal": value(total.equal, "rows with the reference's bits", n=total.rows),
            "tokens": value(total.tokens, "tokens"),
            "differ": value(total.differ, "tokens", n=total.tokens),
            "longest": value(max(lengths), "tokens"),
        },
        cases=total.rows + total.tokens,
        data={"failures": failures},
        checks=[f"{call}{', ' * bool(cache)}{cache}, {tokens} tokens" for tokens, call, cache in plan],
    )

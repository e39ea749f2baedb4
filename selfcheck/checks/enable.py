"""``qaxis.enable(model, budget)`` as the README writes it, default options, on a model of 32 heads and long prompts."""

from __future__ import annotations

import itertools
from typing import Any

import torch

import qaxis

from ..harness.claim import Context, NotRunError, Result, value
from ..inputs import random_llama
from ..inputs.capture import Captured, watched

LENGTHS = (1024, 2048, 4096, 8192, 16384)
#: what stands after the model in the call; () is the default budget
CALLS: dict[str, tuple[qaxis.Budget, ...]] = {
    "enable(model, Budget(coverage=0.1, minimum=64))": (qaxis.Budget(coverage=0.1, minimum=64),),
    "enable(model)": (),
}
NEW = 4
#: query rows of the prompt that are compared: so many from the beginning, the middle and the end
ROWS = 4
#: the layer that is looked at
LAYER = 1


class _Compared:
    """Compares what attention gave with the reference, bit for bit, while the model runs."""

    def __init__(self, budget: qaxis.Budget) -> None:
        self.budget, self.rows, self.wrong, self.calls = budget, 0, 0, 0

    def __call__(self, seen: Captured, output: torch.Tensor) -> None:
        if seen.layer != LAYER:
            return
        self.calls += 1
        m, n = seen.q.shape[2], seen.k.shape[2]
        for start in {0, (m - ROWS) // 2, m - ROWS} if m > 3 * ROWS else {0}:
            some = slice(start, min(start + ROWS, m))
            visible = n - m + some.stop
            right = qaxis.topk_attention(
                seen.q[:, :, some], seen.k[:, :, :visible], seen.v[:, :, :visible], self.budget, backend="reference"
            ).output
            differ = (right.transpose(1, 2) != output[:, some]).any(-1)
            self.rows, self.wrong = self.rows + differ.numel(), self.wrong + int(differ.sum())


def _generated(model: Any, tokens: int, arguments: tuple[qaxis.Budget, ...], seed: int) -> _Compared:
    """A prompt of so many random tokens, then a few greedy ones, with qaxis on."""
    compared = _Compared(arguments[0] if arguments else qaxis.Budget())
    numbers = torch.Generator().manual_seed(seed + tokens)
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), generator=numbers).to(model.device)
    qaxis.enable(model, *arguments)
    try:
        with watched("qaxis", compared):
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
    finally:
        qaxis.disable(model)
    if out.shape[1] != tokens + NEW or compared.calls != NEW:
        raise AssertionError(f"{out.shape[1] - tokens} tokens generated, {compared.calls} calls seen")
    return compared


@torch.inference_mode()
def as_documented(context: Context) -> Result:
    """Prompts and generated tokens: it runs, and sampled rows have the bits of the reference."""
    if context.device == "cpu":
        raise NotRunError("this claim needs a GPU (--device cuda)")
    model = random_llama.build(context.device, layers=2, head_dim=128, hidden=4096, intermediate=4096)
    plan = list(itertools.product(LENGTHS[:2] if context.quick else LENGTHS, CALLS))
    return measured(context, model, plan)


def measured(context: Context, model: Any, plan: list[tuple[int, str]]) -> Result:
    """``plan``: prompt lengths and calls."""
    failures: list[str] = []
    rows = wrong = 0
    for tokens, call in context.progress(plan, "prompts"):
        try:
            compared = _generated(model, tokens, CALLS[call], context.seed)
        except Exception as error:
            failures.append(f"{call}, {tokens} tokens: {type(error).__name__}: {error}"[:300])
            continue
        rows, wrong = rows + compared.rows, wrong + compared.wrong
        if compared.wrong:
            failures.append(f"{call}, {tokens} tokens: {compared.wrong} of {compared.rows} rows differ")
    return Result(
        passed=not failures,
        verdict=failures[0] if failures else "it runs, and rows have the bits of the reference",
        headline=f"{len(plan) - len(failures)} of {len(plan)} prompts right, {wrong} of {rows} rows differ",
        values={
            "prompts": value(len(plan), "prompts"),
            "failed": value(len(failures), "prompts", n=len(plan)),
            "rows": value(rows, "rows"),
            "wrong": value(wrong, "rows", n=rows),
            "longest": value(max(tokens for tokens, _ in plan), "tokens"),
        },
        cases=rows,
        data={"failures": failures},
        checks=[f"{call}, {tokens} tokens" for tokens, call in plan],
    )

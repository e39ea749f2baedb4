"""How long each token of a generation takes, by marks that wait for nothing."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any, NamedTuple

import torch
from transformers import StoppingCriteria, StoppingCriteriaList


class Ticks(StoppingCriteria):
    """A criterion of ``generate`` that never stops it: it marks when each token is known.

    On a GPU a mark is an event of the stream, so that the host runs ahead exactly as far as it would without.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.marks = device.type == "cuda", list[Any]()
        #: more memory than before the second token, at its highest; of the first token the prompt has its share
        self.base = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
            if len(self.marks) == 1:
                torch.cuda.reset_peak_memory_stats()
                self.base = torch.cuda.memory_allocated()
        else:
            self.marks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def milliseconds(self) -> list[float]:
        """From each token to the next: one fewer than there are tokens."""
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in itertools.pairwise(self.marks)]
        return [1000 * (b - a) for a, b in itertools.pairwise(self.marks)]

    def peak(self) -> int:
        """Bytes that the tokens after the first needed beyond what was there."""
        return torch.cuda.max_memory_allocated() - self.base if self.cuda else 0


def generated(model: Any, ids: torch.Tensor, new: int, cache: Any = None, **options: Any) -> tuple[Any, Ticks]:
    """``new`` greedy tokens after ``ids [1, n]`` by the model's own ``generate``, and their marks."""
    ticks = Ticks(ids.device)
    given = {} if cache is None else {"past_key_values": cache}
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, do_sample=False,
        pad_token_id=0, stopping_criteria=StoppingCriteriaList([ticks]), **given, **options,
    )  # fmt: skip
    if len(ticks.marks) != new:
        raise AssertionError(f"{len(ticks.marks)} tokens were marked, {new} asked for")
    return out, ticks


class Median(NamedTuple):
    """A median, its 95 % interval by order statistics, the mean, and the largest."""

    value: float
    low: float
    high: float
    mean: float
    largest: float
    n: int


def median(x: list[float]) -> Median:
    """Of at least one number."""
    ordered, n = sorted(x), len(x)
    low = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return Median(middle, ordered[low], ordered[n - 1 - low], sum(x) / n, ordered[-1], n)

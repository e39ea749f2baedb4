"""What the GPU does for one token: its kernels in order, by what they are for."""

from __future__ import annotations

import re
from typing import Any

import torch

from .ways import Running

#: kinds of kernels by their names, the first that fits; what is none of them is "other"
KINDS = {
    "append": r"append|write_rows",
    # PyTorch's own operations are none of these: an embedding is an "indexSelect".
    "attention": r"^(?!.*at::native).*(score|choose|attend|flash|fmha|sdpa|_split_|_merge_|compact|rescore|select)",
    "weights": r"gemm|gemv|cutlass|cublas|nvjet|splitKreduce|dot_kernel|sm\d+_xmma",
}
#: microseconds: shorter kernels of one kind that follow each other are one piece of the record
CLOSE = 3.0


def kind_of(name: str) -> str:
    """What a kernel of this name is for."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def of(running: Running, tokens: int) -> dict[str, Any]:
    """One token of a generation, once it runs: pieces of its timeline, and microseconds by kind, gaps included."""
    from torch.profiler import ProfilerActivity, profile

    running.generate(4)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        running.generate(6)
        torch.cuda.synchronize()
    spans = [
        (event.name, float(event.time_range.start), float(event.time_range.end))
        for event in seen.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.end > event.time_range.start
    ]
    return {"way": running.way.name, "tokens": tokens, **one_token(sorted(spans, key=lambda s: s[1]))}


def one_token(spans: list[tuple[str, float, float]]) -> dict[str, Any]:
    """The last whole token of kernels ``(name, start, end)`` in order of time, in microseconds from its beginning.

    A token ends where its id is chosen: at the ``argmax`` of ``generate``.
    """
    ends = [i for i, (name, _, _) in enumerate(spans) if re.search("argmax", name, re.IGNORECASE)]
    if len(ends) < 2:
        raise AssertionError(f"{len(ends)} tokens were seen; a timeline needs two")
    token = spans[ends[-2] + 1 : ends[-1] + 1]
    zero = spans[ends[-2]][2]
    took: dict[str, float] = {}
    pieces: list[list[Any]] = []
    at = zero
    for name, start, end in token:
        kind = kind_of(name)
        took["gap"] = took.get("gap", 0.0) + max(0.0, start - at)
        took[kind] = took.get(kind, 0.0) + max(0.0, end - max(at, start))
        if pieces and pieces[-1][0] == kind and start - zero - pieces[-1][2] < CLOSE:
            pieces[-1][2] = round(end - zero, 1)
        else:
            pieces.append([kind, round(start - zero, 1), round(end - zero, 1)])
        at = max(at, end)
    return {
        "pieces": pieces,
        "took": {kind: round(t, 1) for kind, t in took.items()},
        "whole": round(at - zero, 1),
        "kernels": len(token),
    }

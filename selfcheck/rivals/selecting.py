"""Other ways to take the k best of every row: torch's, and FlashInfer's and SGLang's where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import qaxis

#: how often a way is asked for the same
AGAIN = 20
#: of scores ``[rows, n]`` the positions of the k best, ``[rows, k]``
Way = Callable[[torch.Tensor], torch.Tensor]


def of_torch(k: int) -> dict[str, Way]:
    """torch's own; the stable sort is the one that promises which of equal scores it takes."""
    return {
        "torch.topk": lambda x: torch.topk(x, k).indices,
        "torch.topk unsorted": lambda x: torch.topk(x, k, sorted=False).indices,
        "torch.sort stable": lambda x: torch.sort(x, descending=True, stable=True).indices[:, :k],
    }


def of_flashinfer(k: int) -> dict[str, Way]:
    """FlashInfer's top-k as it comes, and told to be deterministic, with ties to the lower position if it knows how."""
    import flashinfer

    ways: dict[str, Way] = {"flashinfer": lambda x: flashinfer.top_k(x, k)[1]}
    ways["flashinfer deterministic"] = lambda x: flashinfer.top_k(x, k, deterministic=True)[1]
    try:
        from flashinfer.topk import TopKTieBreak
    except ImportError:
        return ways
    small = TopKTieBreak.SMALL
    ways["flashinfer lower first"] = lambda x: flashinfer.top_k(x, k, deterministic=True, tie_break=small)[1]
    return ways


def of_sglang(scores: torch.Tensor, k: int) -> dict[str, Way]:
    """SGLang's top-k, which is for 2048 of each row."""
    import sgl_kernel

    lengths = torch.full((len(scores),), scores.shape[1], dtype=torch.int32, device=scores.device)
    return {"sglang": lambda x: sgl_kernel.fast_topk_v2(x, lengths, k)} if k == 2048 else {}


def ways(scores: torch.Tensor, k: int) -> tuple[dict[str, Way], dict[str, str]]:
    """All that select from such scores, by name, and why others cannot be run here."""
    found: dict[str, Way] = {
        "qaxis": lambda x: qaxis.topk(x, k, nan="last").indices,
        "qaxis by rank": lambda x: qaxis.topk(x, k, order="rank", nan="last").indices,
        **of_torch(k),
    }
    left_out: dict[str, str] = {}
    if not scores.is_cuda:
        return found, left_out
    rivals: dict[str, Way] = {}
    for name, make in (("flashinfer", partial(of_flashinfer, k)), ("sglang", partial(of_sglang, scores, k))):
        try:
            rivals |= make()
        except Exception as error:
            left_out[name] = why(error)
    for name, way in rivals.items():
        try:
            way(scores)
            torch.cuda.synchronize()
            found[name] = way
        except Exception as error:
            left_out[name] = why(error)
    return found, left_out


def why(error: Exception) -> str:
    """An error in a line of printable ASCII."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200].encode("ascii", "replace").decode()


def judged(way: Way, scores: torch.Tensor, right: torch.Tensor) -> str:
    """Whether a way gives the stable sort's sets ``right [rows, k]``, and the same sets in the same order each time."""
    first = way(scores).long()
    sets = bool(torch.equal(first.sort(-1).values, right.sort(-1).values))
    repeats = all(torch.equal(way(scores).long(), first) for _ in range(AGAIN))
    return ("stable" if sets else "other ties") + ("" if repeats else ", varies")

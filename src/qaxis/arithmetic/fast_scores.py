"""Fast scores: quicker than the canonical ones, and how far from them they can be.

In a kernel a fast score is kept as a 16-bit integer ``floor(s * UNITS / range) + 2^15`` where ``range`` is at least
``|q| max|k|``, so all keys of a row, or of a group of its keys, have one error bound and one comparison decides. The
bound has three parts:

* ``rounding``: the matrix product and the canonical tree. Each of the D additions of a product, whichever order a
  tensor core takes and whether it rounds or truncates, loses at most ``2^-21`` of ``sum |q_d k_d| <= |q||k|``
  (a float32 accumulator with one bit fewer than it has, twice over), and the tree loses less than 32 such parts.
* ``residual``: what the codes of a key leave out, by Cauchy-Schwarz; 0 if the codes are the cache. The Triton step
  takes ``|q| max|k - code|`` over the head; the CUDA step, of every group of codes, ``|q w| max|(k - code) / w|`` with
  the roots ``w`` of the group's scales: channels with large steps are those of which queries have little.
* ``split``: the query, scaled by a group's scales, as two 8-bit parts leaves ``largest / (127 * 254 * 2)`` a channel,
  against codes of at most 128.
"""

from __future__ import annotations

from itertools import product

import torch

from . import reference

#: integers of the 16-bit score between 0 and the largest possible score
UNITS = 32700.0
#: a row whose range is outside these is scored canonically throughout
SMALLEST, LARGEST = 1e-20, 1e37
#: and one whose query is shorter: its squares have too few bits in float32 for its length to be a bound
SHORTEST = 1e-19
#: the least scale that a query is split for: scaled to 127 under a smaller one it could leave float32
LEAST_CODE_SCALE = 1e-36
#: bounds are stored a little too large, so that their own rounding cannot make them too small
UPWARD = 1 + 2.0**-10
#: bounds that are float32 numbers of full precision
SMALLEST_NORM, LARGEST_NORM = 2.0**-126, torch.finfo(torch.float32).max
#: what two 8-bit parts of a query leave out, times the largest code: per channel and unit of the largest scaled query
SPLIT = 128 / (127 * 254 * 2) * 1.02
#: queries of a float64 product, and numbers that it takes or gives on a CPU: so few that they stay in its cache
QUERIES, PRODUCT_ELEMENTS = 512, 1 << 19


def rounding(dim: int) -> float:
    """Relative error of a fast score against the canonical, of ``|q| max|k|``."""
    return (dim + 32) * 2.0**-21


def norms(x: torch.Tensor) -> torch.Tensor:
    """Upper bound on the length of each vector, ``[..., D] -> float32 [...]``; bits equal on every device.

    Squares of float32 are exact in float64, where they are added by the canonical tree; what is not a number gives
    infinity, so a bound is never too small.
    """
    wide = x.double()
    length = torch.sqrt(reference.tree_sum(wide * wide)) * UPWARD
    # Below normal numbers a float32 has too few bits to be a bound.
    bound = torch.where(length > 0, length.float().clamp(min=SMALLEST_NORM), 0.0)
    return torch.where(length <= LARGEST_NORM, bound, torch.inf)


def over_roots(left_out: torch.Tensor, exponents: torch.Tensor, group_size: int) -> torch.Tensor:
    """What codes leave out of keys ``[B, Hkv, n, D]``, every channel divided by the root of its scale.

    Scales are powers of two, ``exponents [B, Hkv, n / group_size, D]`` of any integer dtype.
    """
    return left_out * reference.roots_of(exponents.int()).repeat_interleave(group_size, 2)


def largest_norm(x: torch.Tensor) -> torch.Tensor:
    """Upper bound on the length of the vectors ``[B, Hkv, n, D]`` of a head, float32 ``[B, Hkv]``."""
    if x.shape[2] == 0:
        return torch.zeros(x.shape[:2], dtype=torch.float32, device=x.device)
    return norms(x).amax(2)


def product_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Scores by matrix product, float32 ``[B, H, M, N]``, within ``rounding.product_error_bound`` of the canonical.

    The product is of float64 numbers, which autocast leaves alone and no setting of torch lets be shortened (TF32,
    bfloat16 parts): no setting has to be read or changed. Where the canonical partial sums could leave float32 the
    bound says nothing: there the canonical scores are computed, and refused if they overflow.
    """
    largest = float(
        torch.linalg.vector_norm(q.double(), dim=-1).amax() * torch.linalg.vector_norm(k.double(), dim=-1).amax()
    )
    if largest > 1e38:
        out = reference.scores(q, k)
        reference.check_scores(out)
        return out
    batch, heads, m, dim = q.shape
    kv_heads, n = k.shape[1], k.shape[2]
    grouped = q.reshape(batch, kv_heads, -1, dim)
    out = torch.empty(batch, kv_heads, heads // kv_heads * m, n, dtype=torch.float32, device=q.device)
    at_once = PRODUCT_ELEMENTS if q.device.type == "cpu" else reference.CHUNK_ELEMENTS
    keys_at_once = max(1, at_once // max(dim, min(out.shape[2], QUERIES)))
    for b, h in product(range(batch), range(kv_heads)):
        queries = grouped[b, h].double()
        for start in range(0, n, keys_at_once):
            keys = k[b, h, start : start + keys_at_once].double().transpose(-1, -2)
            for first in range(0, queries.shape[0], QUERIES):
                some = slice(first, first + QUERIES)
                out[b, h, some, start : start + keys_at_once] = torch.matmul(queries[some], keys)
    return out.reshape(batch, heads, m, n)

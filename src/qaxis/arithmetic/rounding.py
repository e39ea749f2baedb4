"""How far a computed score can be from the exact one, and which order therefore survives rounding.

Bounds are rigorous (Higham, Accuracy and Stability of Numerical Algorithms, chapter 3), not estimates:
they hold for every input whose products stay inside float32.
"""

from __future__ import annotations

import math

import torch

from ..validation import check_qkv, check_qkv_form

UNIT_ROUNDOFF = 2.0**-24


def gamma(n: int) -> float:
    """``n u / (1 - n u)``: the relative error that n roundings to nearest can add up to."""
    return n * UNIT_ROUNDOFF / (1 - n * UNIT_ROUNDOFF)


def order_error_bound(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Bound e_i on the error of a key's canonical score, raw or by the computed unit query (paper, Theorem 3).

    Let s_i be the canonical score of the raw query, t_i that of ``unit_query(q)`` (both float32), and c > 0
    the factor common to all keys that the computed normalisation carries. Then |s_i - <q,k_i>| <= e_i and
    |t_i / c - <q,k_i>| <= e_i, so two keys whose exact scores differ by more than e_i + e_j keep their order
    in both. With L = ceil(log2 D) levels of the tree, e_i = gamma_{L+3} sum_d |q_d k_id|, which is at most
    gamma_{L+3} |q| |k_i|, plus a term for products and quotients that underflow.

    Args:
        q: ``[B, H, M, D]``; float32, float16 or bfloat16.
        k: ``[B, Hkv, N, D]``, same dtype and device; H a multiple of Hkv (GQA).

    Returns:
        float64 ``[B, H, M, N]``.

    Raises:
        ValueError: on mismatched shapes, dtypes or devices, NaN or Inf.
    """
    check_qkv(q, k)
    batch, heads, m, dim = q.shape
    q, k = q.double().abs(), k.double().abs()
    grouped = q.reshape(batch, k.shape[1], -1, dim)
    absolute = (grouped @ k.transpose(-1, -2)).reshape(batch, heads, m, k.shape[2])
    length = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    mass = k.sum(-1).repeat_interleave(heads // k.shape[1], dim=1)[:, :, None]
    levels = (dim - 1).bit_length()
    underflow = 2.0**-148 * (length * (mass + dim) + dim)
    # The bound itself is computed in float64: one part in 2^40 pays for that.
    return (gamma(levels + 3) * absolute + underflow) * (1 + 2.0**-40)


def product_error_bound(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Bound on |matrix product - canonical score| for every key of a row, float32 ``[B, H, M, 1]``.

    Any order of summation of D float32 products has error at most gamma_D sum|q_d k_d| <= gamma_D |q||k|. Two such
    results differ by at most twice that; a product in float64, rounded to float32 at the end, is nearer: u <= gamma_D.
    The factor 1.01 pays for the rounding of the bound itself and of the float64 sums, the last term for what
    underflows. Arguments as :func:`order_error_bound`, unchecked.
    """
    dim = q.shape[-1]
    group = q.shape[1] // k.shape[1]
    q_norm = torch.linalg.vector_norm(q.double(), dim=-1, keepdim=True)
    k_norm = torch.linalg.vector_norm(k.double(), dim=-1).amax(dim=-1).repeat_interleave(group, dim=1)
    bound = 1.01 * 2 * gamma(dim) * q_norm * k_norm[:, :, None, None] + 4 * dim * 2.0**-126
    return bound.float() * (1 + 2.0**-20)


def selection_output_bound(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, kept: int) -> float:
    """Bound on |output of exactness="selection" - canonical output|, any element.

    Both are the same softmax over the same ``kept`` keys; they differ by rounding. A logit is off by at most
    d = scale |q||k| (2 gamma_D + 4 u_in), u_in = u of the input dtype if that is shorter than float32 (a fused
    kernel may round the scaled query to it). Weights then move by a factor within e^(+-2d), summation and the
    two exponentials by at most (2 kept + 64) u, and weights held in the input dtype by 2 u_in; each moves the
    output by at most that times max|v|.

    Args:
        q, k, v: as :func:`~qaxis.topk_attention`.
        scale: softmax scale.
        kept: largest number of keys that any query keeps.

    Raises:
        ValueError: as :func:`~qaxis.topk_attention`.
    """
    check_qkv_form(q, k, v)
    dim = q.shape[-1]
    rounding = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[q.dtype]
    q_max = float(torch.linalg.vector_norm(q.double(), dim=-1).max())
    k_max = float(torch.linalg.vector_norm(k.double(), dim=-1).max())
    logit = scale * q_max * k_max * (2 * gamma(dim) + 4 * rounding + 4 * UNIT_ROUNDOFF)
    relative = math.expm1(2 * logit) + (2 * kept + 64) * UNIT_ROUNDOFF + 4 * rounding
    return float(v.abs().max()) * relative

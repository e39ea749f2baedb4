"""How far a fast score can be from the canonical one, in the units in which the fast score is kept.

A fast score is kept as a 16-bit integer ``floor(s * UNITS / range) + 2^15`` where ``range`` is at least ``|q| max|k|``,
so every key of a row has one error bound and one comparison decides. The bound has three parts:

* ``rounding``: the matrix product and the canonical tree. Each of the D additions of a product, whichever order a
  tensor core takes and whether it rounds or truncates, loses at most ``2^-21`` of ``sum |q_d k_d| <= |q||k|``
  (a float32 accumulator with one bit fewer than it has, twice over), and the tree loses less than 32 such parts.
* ``residual``: what the codes of a key leave out, by Cauchy-Schwarz ``|q| max|k - code|``; 0 if the codes are the
  cache.
* ``split``: the query, scaled by a group's steps, as two 8-bit parts leaves ``largest / (127 * 254 * 2)`` a channel,
  against codes of at most 128.
"""

from __future__ import annotations

#: integer steps of the 16-bit score between 0 and the largest possible score
UNITS = 32700.0
#: a row whose range is outside these is scored canonically throughout
SMALLEST, LARGEST = 1e-20, 1e37
#: what two 8-bit parts of a query leave out, times the largest code: per channel and unit of the largest scaled query
SPLIT = 128 / (127 * 254 * 2) * 1.02


def rounding(dim: int) -> float:
    """Relative error of a fast score against the canonical, of ``|q| max|k|``."""
    return (dim + 32) * 2.0**-21

"""The k best of rows of scores by themselves: one set and one order, whatever computes them."""

from .api import TopK, topk

__all__ = ["TopK", "topk"]

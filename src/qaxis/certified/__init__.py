"""Certified decoding: the exact top-k set, found by reading fewer bytes than the keys (see bounds.py for the proof)."""

from .decode import Decoder, Step, Tuning
from .index import KeyIndex, index_cache, index_keys

__all__ = ["Decoder", "KeyIndex", "Step", "Tuning", "index_cache", "index_keys"]

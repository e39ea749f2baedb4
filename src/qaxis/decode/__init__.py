"""One decode step whose selection and bits are the canonical ones, found by reading fewer bytes than the keys.

``arithmetic/fast_scores.py`` has the proof.
"""

from .api import Decoder, Step
from .index import KeyIndex, index_cache, index_keys

__all__ = ["Decoder", "KeyIndex", "Step", "index_cache", "index_keys"]

"""One decode step whose selection and bits are the canonical ones, found by reading fewer bytes than the keys.

``arithmetic/fast_scores.py`` has the proof.
"""

from .api import Decoder
from .index import KeyIndex, index_cache, index_keys
from .triton_step import Step

__all__ = ["Decoder", "KeyIndex", "Step", "index_cache", "index_keys"]

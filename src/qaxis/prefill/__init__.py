"""Prefill over exactly the canonical top-k keys of every query, at the speed of matrix products."""

from .attention import Prefill, prefill_attention, selected_mask, selected_positions
from .plan import PrefillTuning, tuning_for

__all__ = ["Prefill", "PrefillTuning", "prefill_attention", "selected_mask", "selected_positions", "tuning_for"]

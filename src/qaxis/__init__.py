"""qaxis: exact, training-free top-K sparse attention that ranks keys by the query axis."""

from __future__ import annotations

from .arithmetic import interpreter as _interpreter  # noqa: F401  first: chosen before transformers loads Triton
from .attention.api import TopKAttention, canonical_scores, topk_attention, topk_indices, unit_query
from .budget import Budget
from .measures.entropy import EntropyScaling, attention_entropy, fit_entropy_scaling
from .measures.perplexity import PerplexityChange, paired_change, perplexity, token_losses
from .models.cache import Cache, Int8Cache
from .models.enable import disable, enable, sparse
from .models.observing import observe_attention
from .models.recording import Recording, record
from .ranking.api import TopK, topk

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Cache",
    "EntropyScaling",
    "Int8Cache",
    "PerplexityChange",
    "Recording",
    "TopK",
    "TopKAttention",
    "attention_entropy",
    "canonical_scores",
    "disable",
    "enable",
    "fit_entropy_scaling",
    "observe_attention",
    "paired_change",
    "perplexity",
    "record",
    "sparse",
    "token_losses",
    "topk",
    "topk_attention",
    "topk_indices",
    "unit_query",
]

"""qaxis: exact, training-free top-K sparse attention that ranks keys by the query axis."""

from __future__ import annotations

from .attention import TopKAttention, topk_attention
from .budget import Budget
from .cache import Int8Cache
from .entropy import EntropyScaling, attention_entropy, fit_entropy_scaling
from .integration import disable, enable, sparse
from .observing import observe_attention
from .perplexity import PerplexityChange, paired_change, perplexity, token_losses
from .ranking import canonical_scores, topk_indices, unit_query
from .recording import Recording, record

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "EntropyScaling",
    "Int8Cache",
    "PerplexityChange",
    "Recording",
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
    "topk_attention",
    "topk_indices",
    "unit_query",
]

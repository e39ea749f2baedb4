"""Chooses Triton's interpreter where there is no GPU, before anybody loads Triton.

Triton decides when it is loaded how its own functions run, and transformers loads it: this is therefore the first
module that ``import qaxis`` runs.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

"""Chooses Triton's interpreter where there is no GPU, before anybody loads Triton.

Triton decides when it is loaded how its own functions run, and transformers loads it: this is therefore the first
module that ``import qaxis`` runs. What the user set stays: Triton reads 1, true, yes, on and y, in any case, as on and
anything else as off; the reference computes either way.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
    os.environ["TRITON_INTERPRET"] = "1"

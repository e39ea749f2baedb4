"""The checks. Without a GPU, Triton's interpreter has to be chosen before anything (transformers does) loads Triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

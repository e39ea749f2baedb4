"""Loaded first: it chooses Triton's interpreter where there is no GPU, before transformers loads Triton without it."""

import selfcheck.checks  # noqa: F401

"""What is not a claim: bad input, layouts, tampering, mutants."""

import qaxis  # noqa: F401  before anything loads transformers: it chooses Triton's interpreter

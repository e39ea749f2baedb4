"""The checks, one module a subject; checks.toml says which function measures which claim."""

import qaxis  # noqa: F401  before anything loads transformers: it chooses Triton's interpreter

"""Top-k attention: the public calls, the choice of a backend, exact selection, canonical attention over it."""

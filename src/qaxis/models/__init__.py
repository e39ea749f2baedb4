"""qaxis in transformers: the only package that knows that library."""

"""The sealed self-check: verify the lock, run every check, write evidence."""

"""One module a figure; each has `draw(evidence) -> Figure` and reads evidence only."""

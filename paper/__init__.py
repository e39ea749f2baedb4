"""The preprint: numbers.tex from evidence, then paper.pdf."""

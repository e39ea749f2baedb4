"""Edits of the tree, its surroundings and its archive, and what notices each. Run by `nox -s tamper`.

Each row is one edit on a copy of the tree and one command. The edit must be caught: the command names it, exits with
an error and writes no output. Or it must have no effect: the outputs are those of the tree without it, byte for byte.
A last section is of edits that nothing here can catch, and that must pass, so that the table says no less than the
truth.
"""

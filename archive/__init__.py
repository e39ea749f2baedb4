"""The archive: what binds and packs everything that the project gives out. Downstream of all else."""

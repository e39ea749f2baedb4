"""How keys and values are stored: grids of codes and scales, formats of a cache, sides that grow, kernels that read."""

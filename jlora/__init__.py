"""jlora: low-rank adapters in JAX."""

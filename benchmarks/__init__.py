"""Paired measurements of jlora against hand-written JAX and against torch with PEFT."""

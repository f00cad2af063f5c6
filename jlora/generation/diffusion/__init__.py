"""Conditional diffusion and flow matching on latents: paths, losses, networks, samplers."""

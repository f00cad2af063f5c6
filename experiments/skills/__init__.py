"""Skills of a diffusion policy as adapters, cloned from experts in a simulator."""

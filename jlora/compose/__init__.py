"""Composition of several adapters in one forward pass or one denoising loop."""

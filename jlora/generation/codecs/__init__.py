"""Codecs between adapters and latents: PCA, convolutional and token autoencoders."""

"""Pruning of whole units of a model: what is linked, what goes, and LoRA on both sides."""

"""Adapters as kohya / LyCORIS files, both ways."""

"""PEFT's own `add_weighted_adapter`, combination by combination."""

"""Pictures with names in several styles, and base D: a small DiT on pixels trained on them."""

"""Adapters of picture styles on base D: a zoo of them, generators from a few pictures, rivals."""

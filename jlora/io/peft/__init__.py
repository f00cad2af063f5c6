"""Adapters as PEFT directories, both ways, without torch: one file per part of the format."""

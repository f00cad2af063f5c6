"""What changes over time: ranks, layers, masks."""

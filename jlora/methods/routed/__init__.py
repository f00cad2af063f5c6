"""Several adapters per site, chosen per token."""

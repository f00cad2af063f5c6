"""Routers, dispatch back-ends and balance rules for mixtures of adapters."""

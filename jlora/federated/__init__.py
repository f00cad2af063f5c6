"""Federated: banks of client adapters to what the server sends back. Aggregations of one site.

Each file holds one, `from jlora.federated.flora import flora`; `jlora.merging.per_site` maps those
that return one adapter over all sites of a bank.
"""

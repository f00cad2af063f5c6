"""Initialisations: the values that training starts from, set on an adapter that exists.

Each is one function, ``name(key, adapter, params, ...) -> adapter``, that changes neither the
parameters nor the tree of the adapter; `jlora.contracts.initialisation` holds their laws.
"""

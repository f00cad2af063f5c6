"""Measurements at the sites of a function: what initialisations and rank allocation start from, and
what training changed.
"""

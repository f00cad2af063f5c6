"""Magnitude and direction trained apart."""

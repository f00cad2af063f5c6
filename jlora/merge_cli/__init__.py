"""`python -m jlora.merge`: adapters in files merged to a file, by a configuration."""

"""Running many adapters over one base."""

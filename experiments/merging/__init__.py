"""How good merges of real adapters are: on text tasks and on pictures, as pages and figures."""

"""The command line: `jlora merge | convert | inspect | systems | claims`."""

"""The core: sites, the contract of a method, lift, merge, shardings."""

"""Claims of the papers, checked on pinned real assets: one file per claim, `jlora claims NAME`."""

"""The router process. `decide` is where to begin; docs/structure.md has a map of the folders."""

"""One page about a run, readable without network."""

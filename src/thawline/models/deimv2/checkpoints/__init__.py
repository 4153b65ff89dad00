"""DEIMv2 checkpoints: read from and written to every published layout."""

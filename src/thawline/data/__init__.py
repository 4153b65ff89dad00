"""Floor 1: from files to examples and batches."""

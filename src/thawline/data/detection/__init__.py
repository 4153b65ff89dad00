"""Detection datasets: reading, checking, augmenting and batching labelled images."""

"""Datasets: from files to examples and batches."""

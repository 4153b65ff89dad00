"""Metrics: from predictions and references to numbers."""

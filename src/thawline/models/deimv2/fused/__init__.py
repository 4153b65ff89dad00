"""Inference forms of DEIMv2's modules."""

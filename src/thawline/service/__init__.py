"""Detectors as an HTTP service, on LitServe."""

"""Detectors in a browser: a folder of static files."""

"""Floor 1: networks that are the project's own."""

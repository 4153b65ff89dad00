"""Floor 4: paired measurements, each a module to run: `python -m thawline.bench.<name>`."""

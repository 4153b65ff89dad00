"""Models, datasets and processes that several tests share."""

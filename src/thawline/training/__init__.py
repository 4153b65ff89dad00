"""Floor 3: objectives on top of transformers' Trainer."""

"""DEIMv2's training loss: terms, matching and their sum."""

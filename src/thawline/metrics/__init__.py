"""Floor 1: from predictions and references to numbers."""

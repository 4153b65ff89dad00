"""DEIMv2: the detector, its eight sizes, and what trains it."""

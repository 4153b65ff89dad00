"""Floor 0: tensor maths that knows torch and nothing else of the project."""

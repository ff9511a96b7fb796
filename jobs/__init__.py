"""One thin entry a step: parse, read, step, write. ``python -m jobs.<step> recipe.yaml name=value``."""

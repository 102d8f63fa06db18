"""The training loop and all parts of a step."""

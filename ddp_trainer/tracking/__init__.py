"""Writes the records of a run to disk, W&B, TensorBoard and the console, and reads them back from disk."""

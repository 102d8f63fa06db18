"""One run, from its settings to its results on disk."""

"""The report of a run, its pictures and the model card, from the run directory's files alone."""

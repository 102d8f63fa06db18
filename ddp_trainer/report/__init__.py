"""The report of a run, its pictures and the model card, made from nothing but the files in the run directory."""

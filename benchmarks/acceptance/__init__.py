"""The acceptance of a machine with GPUs: stages of tests, measurements and whole runs, within a time limit."""

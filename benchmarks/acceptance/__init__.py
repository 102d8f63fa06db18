"""Checks a machine with GPUs within a time limit, in stages: tests, measurements and whole runs."""

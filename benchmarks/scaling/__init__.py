"""Measures how the time and peak memory of preparation, training and report grow with the dataset."""

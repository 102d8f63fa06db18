"""Turns image files into a dataset (`python -m data_prep`), and the dataset into augmented batches on the device.

This package never imports `ddp_trainer`.
"""

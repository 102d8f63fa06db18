"""Builds the report and the model card of a run from its directory alone.

Also makes the tables of sweeps and the curves of learning rate range tests.
"""

"""The report and the model card of a run, built only from its directory; tables of sweeps, curves of range tests."""

"""From image files to augmented batches on the device; `python -m data_prep` is the first half. Never imports
`ddp_trainer`."""

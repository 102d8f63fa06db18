"""PIXELS: everything about images, nothing about learning. Never imports `ddp_trainer`."""

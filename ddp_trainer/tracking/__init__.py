"""What a run records, on disk, on the console and elsewhere, and how it is read back."""

"""Quantised checkpoints, read as the plain ones they stand for: one file a family, and the table in `schemes`."""

"""Scans as arrays: files, the canonical grid, and what is done to a scan before the model."""

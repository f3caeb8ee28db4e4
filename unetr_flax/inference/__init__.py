"""Segmentation of scans of any size with a model of one fixed input size."""

"""Measures of how well a segmentation agrees with the true labels."""

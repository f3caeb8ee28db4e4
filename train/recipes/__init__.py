"""Recipes: the options with which a known task is trained, `RECIPE` in a file for each."""

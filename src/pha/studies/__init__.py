"""Comparisons of models: what is trained, and how the results are told."""

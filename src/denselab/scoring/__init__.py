"""Predictions in files against truth in files, task by task; needs no torch."""

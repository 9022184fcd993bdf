"""Rows of training data, in batches."""

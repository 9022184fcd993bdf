"""Quantized layers, and any layer seen as the matrix it multiplies by."""

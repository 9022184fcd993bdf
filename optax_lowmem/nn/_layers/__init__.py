"""Quantized layers, and adapters on them."""

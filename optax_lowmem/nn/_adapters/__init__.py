"""Adapters: what is trained on top of a frozen layer."""

"""Adapters, taken into the weights of a model."""

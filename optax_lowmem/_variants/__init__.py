"""Kinds of adapters: what they hold, and what they add to a weight."""

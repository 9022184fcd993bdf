"""The step, and what is measured beside it."""

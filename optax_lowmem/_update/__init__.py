"""One update of a stored state."""

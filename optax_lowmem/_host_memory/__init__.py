"""Arrays in pinned host memory, and how much of it there is."""

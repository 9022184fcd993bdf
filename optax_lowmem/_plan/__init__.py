"""What a run will hold in memory, known before it: from shapes, and from the compiler of a card."""

"""What arguments may be, and how a bad one is refused."""

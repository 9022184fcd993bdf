"""State on a mesh of devices."""

"""Traced programs: read, proved and cut into parts."""

"""What `lowmem` can be told to do."""

"""Parameters in bfloat16: exact float32 masters, and unbiased rounding."""

"""A Llama, or one of its relatives, in Flax NNX."""

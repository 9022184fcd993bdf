"""A linear layer seen as a matrix, packed or corrected: what Flax NNX and Linen share."""

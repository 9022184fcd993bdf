"""The optimizer's update within the backward pass of layers that are stacked."""

"""A model as a tree of layers: names, targets, and their replacement."""

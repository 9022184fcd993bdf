"""Which gradients make a step: accumulated ones, and none that are not finite."""

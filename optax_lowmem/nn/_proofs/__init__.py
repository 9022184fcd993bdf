"""Which modules are one matrix product, by proof from what they compute."""

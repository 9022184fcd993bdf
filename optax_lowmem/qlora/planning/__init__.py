"""Which model, settings and card go together: plans, comparisons, recommendations."""

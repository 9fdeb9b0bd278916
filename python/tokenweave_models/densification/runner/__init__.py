"""`tokenweave densification ...`: sweeps, regimes, exact laws, the best density, orderings, figures, checks."""

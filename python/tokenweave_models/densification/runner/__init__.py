"""`tokenweave densification ...`: sweeps, regimes, exact laws, the best density, orderings, figures and their checks."""

"""TokenWeave: a decoder whose residual additions and norms go through the allreduce_rmsnorm ops."""

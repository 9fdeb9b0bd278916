"""The schedule on GPUs that need not be here: a replay with the planner's cost model."""

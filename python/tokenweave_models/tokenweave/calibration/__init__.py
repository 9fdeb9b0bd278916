"""What the planner has to know of a device, measured on it."""

"""The decoder over several ranks: text from prompts, and the benches that compare the modes."""

"""`tokenweave localleap ...`: text from a model's folder, and where the time of a decoding step goes."""

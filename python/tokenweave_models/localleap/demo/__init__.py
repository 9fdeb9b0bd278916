"""`tokenweave localleap demo`: a diffusion language model trained on the spot, decoded with every policy."""

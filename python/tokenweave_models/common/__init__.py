"""What the systems share: input text, tokenizing, and output on a terminal."""

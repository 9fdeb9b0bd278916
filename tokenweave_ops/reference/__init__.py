"""What each op means, in plain torch: any dtype, float64 included. Every test compares with these."""

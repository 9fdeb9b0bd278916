"""Exact laws: of the strongest cell on one slope or in the limit, at any density, and of the nearest cell."""

"""B: identity."""

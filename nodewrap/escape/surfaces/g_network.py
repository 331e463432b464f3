"""G: network."""

"""Surface G, inside."""

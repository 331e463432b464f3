"""Surface E, inside."""

"""Surface D, inside."""

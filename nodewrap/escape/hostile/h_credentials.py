"""Surface H, inside."""

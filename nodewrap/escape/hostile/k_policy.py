"""Surface K, inside."""

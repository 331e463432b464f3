"""Surface J, inside."""

"""Surface I, inside."""

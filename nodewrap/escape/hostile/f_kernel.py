"""Surface F, inside."""

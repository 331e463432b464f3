"""Surface B, inside."""

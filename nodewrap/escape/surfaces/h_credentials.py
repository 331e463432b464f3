"""H: credentials."""

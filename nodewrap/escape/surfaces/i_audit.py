"""I: audit."""

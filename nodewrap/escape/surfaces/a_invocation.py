"""A: invocation."""

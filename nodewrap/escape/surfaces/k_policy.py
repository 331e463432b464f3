"""K: policy."""

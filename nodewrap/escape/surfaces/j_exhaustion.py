"""J: exhaustion."""

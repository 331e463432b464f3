"""D: files."""

"""F: kernel."""

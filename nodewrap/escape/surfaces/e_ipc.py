"""E: ipc."""

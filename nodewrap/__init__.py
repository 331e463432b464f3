"""nodewrap: payload isolation, identity and evidence for grid pilots."""

__version__ = "0.1.0"

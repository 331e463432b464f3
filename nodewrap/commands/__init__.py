"""The commands of ``nodewrap``, a module each."""

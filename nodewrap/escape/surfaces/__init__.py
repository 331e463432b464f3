"""The attacks, one module a surface of the catalogue. Each function is called with an Arena, twice: with a wrapper that protects nothing, and with the real one."""

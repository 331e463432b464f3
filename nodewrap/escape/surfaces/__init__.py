"""The attacks, one module a surface of the catalogue. Each is called twice: with a wrapper that protects nothing, and with the real one."""

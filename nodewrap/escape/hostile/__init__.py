"""The hostile code: one module a surface, of the standard library alone, sent as text to ``python3 -I -c`` behind that of ``common``."""

"""SHA-256 without OpenSSL: ``hashlib`` loads libcrypto, 2.5 ms of every start, for the one digest that a request needs. Hot path."""

__all__ = ["args_sha256", "sha256"]

try:
    from _sha2 import sha256  # type: ignore[import-not-found]  # CPython 3.12 and later; typeshed does not know it
except ImportError:
    try:
        from _sha256 import sha256  # type: ignore[import-not-found]  # CPython up to 3.11; typeshed does not know it
    except ImportError:
        from hashlib import sha256  # EL9 builds Python without its own SHA-2 (--with-builtin-hashlib-hashes=blake2)


def args_sha256(args: list[bytes]) -> str:
    """``process.args_sha256``: hex SHA-256 of all arguments, each followed by a NUL byte, as they stand in /proc/PID/cmdline."""
    return str(sha256(b"".join([arg + b"\0" for arg in args])).hexdigest())

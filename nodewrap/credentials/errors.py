"""How bad input becomes a refusal.

Only the calls into cryptography and asn1crypto stand inside ``parsing``: they turn bytes into the plain values of ``certificate.py``,
``crl.py`` and ``attribute.py``. Every decision is made on those values outside of it, so a bug in our own code is never dressed up as a denial.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.x509 import InvalidVersion

from nodewrap.model import Refusal

#: What the two libraries raise on hostile bytes, as found by fuzzing. ValueError: both, for nearly everything (UnicodeDecodeError too).
#: TypeError, KeyError, AttributeError, IndexError: asn1crypto, where lazily parsed content has another type than its field, or an OID
#: that its maps lack. OverflowError: dates and lengths. RecursionError: nesting. UnsupportedAlgorithm, InternalError: keys OpenSSL will not take.
#: InvalidVersion: cryptography's own, not a ValueError.
PARSER_ERRORS = (
    ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError, UnsupportedAlgorithm, InternalError, InvalidVersion,
)


def deny(code: str, text: str) -> Refusal:
    """A refusal with exit status 203; ``text`` is one line."""
    return Refusal(203, code, text)


def mistake(code: str, text: str) -> Refusal:
    """A refusal with exit status 201: the file itself is not what it should be."""
    return Refusal(201, code, text)


def show(value: str) -> str:
    """``value`` for an error line: ASCII, quoted, control characters escaped, at most 200 characters."""
    quoted = ascii(value)
    return quoted if len(quoted) <= 200 else quoted[:197] + "..."


@contextlib.contextmanager
def parsing(what: str, code: str = "NW-X509-PARSE", exit: int = 203) -> Iterator[None]:
    """Turn PARSER_ERRORS of the block into a Refusal that names ``what``; the library's exception stays as ``__cause__``."""
    try:
        yield
    except PARSER_ERRORS as error:
        text = f"{what} cannot be read ({type(error).__name__}); make a new one, or look at it with openssl asn1parse"
        raise Refusal(exit, code, text) from error

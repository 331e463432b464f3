"""Reads the applied policy. On the hot path: ``marshal`` costs no import and no parser (docs/policy.md, "Compiled policy")."""

import marshal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FORMAT = 1
MAX_BYTES = 16 << 20


def load(path: str) -> "dict[str, Any]":
    """The compiled policy in ``path`` (``<policy dir>/current/policy.bin``).

    The file is as trusted as this program: `policy apply` writes it, root owns it and its directory, and the launcher checked the path.
    Raises OSError when it cannot be read, ValueError (one line, ``NW-POLICY-LOAD``) when it is no policy of this version.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        policy = marshal.loads(data) if len(data) <= MAX_BYTES else None
    except (ValueError, EOFError, TypeError):
        policy = None
    if not isinstance(policy, dict) or policy.get("format") != FORMAT:
        raise ValueError(f"NW-POLICY-LOAD: {path} is no compiled policy of format {FORMAT}; next: run 'nodewrap policy apply' on this node")
    return policy

"""The policy child: HELLO, lock, REQUEST, decide, DECISION (docs/wire.md). Spawned for one request, or a worker of ``nodewrap policyd``.

Hot path: stdlib only and little of it; tests/unit/test_hot_path_imports.py holds the list. Nothing here has authority: the launcher checks what
comes back against the guard as if this process were hostile (I2), and takes its death for an internal error (I3).
"""

import _socket
import os
import sys

from nodewrap import decide, model, wire
from nodewrap._core import ffi, lib
from nodewrap.policy import store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = 1
HELLO_FIELDS = {1: "version", 2: "uid", 3: "gid", 4: "credentials", 5: "policy"}


class Hello:
    """What the launcher knows of itself and of the caller: version, uid, gid, credentials (0 or 1), policy (directory)."""

    __slots__ = ("credentials", "gid", "policy", "uid", "version")

    def __init__(self, fields: "list[tuple[int, bytes]]") -> None:
        said = dict(fields)
        if sorted(said) != sorted(HELLO_FIELDS) or len(said) != len(fields):
            raise wire.WireError("HELLO has other fields than expected")
        self.version, self.uid, self.gid, self.credentials = (wire.integer(said[tag]) for tag in (1, 2, 3, 4))
        self.policy = said[5].decode("utf-8", "surrogateescape")
        if self.version != VERSION:
            raise wire.WireError("launcher and policy child are of different versions")


def load_policy(hello: Hello) -> "tuple[dict[str, object], bytes, Any]":
    """Everything the lock will forbid to fetch: the policy, the filter, the credentials package (or None)."""
    verifier: Any = None
    if hello.credentials:
        from nodewrap import credentials

        verifier = credentials
    return (*read_policy(hello.policy), verifier)


def read_policy(directory: str) -> "tuple[dict[str, object], bytes]":
    """The applied policy and the second filter. Raises OSError, and ValueError when it is no policy of this version."""
    policy = store.load(directory + "/policy.bin")
    with open(directory + "/child-decide.bpf", "rb") as file:
        return policy, file.read()


def lock(program: bytes) -> None:
    """From here on: no file, no process, no socket, no executable memory (child-decide.bpf). Raises OSError when the kernel refuses."""
    if lib.nw_lock(ffi.from_buffer(program), len(program)):
        raise OSError(ffi.errno, "seccomp")


def answer(sock: "_socket.socket", caller: "decide.Caller", policy: "dict[str, Any]", credentials: "Any") -> None:
    """Read the REQUEST, decide, send the DECISION. Whatever goes wrong in deciding is an internal error with its place, not a crash."""
    fields, _ = wire.receive(sock, wire.REQUEST)
    try:
        decision = decide.decide(decide.Request(fields), caller, policy, credentials, sock)
    except model.Say as said:
        decision = [(1, VERSION), (2, 0), (3, said.exit), (5, said.text)]
    except model.Refusal as no:
        decision = decide.refusal(no)
    except Exception as error:  # noqa: BLE001  a bug here must reach the record with its place, and must never permit
        decision = decide.refusal(model.Refusal(202, "NW-POLICY", f"the policy layer failed: {_place(error)}; report it, with the record"))
    wire.send(sock, wire.DECISION, decision)


def _place(error: BaseException) -> str:
    """Where it went wrong, without the traceback module (20 ms) and without values, which may be secret."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    where = f"{os.path.basename(at.tb_frame.f_code.co_filename)}:{at.tb_lineno}" if at else "?"
    return f"{type(error).__name__} at {where}"


def serve(sock: "_socket.socket", load: "Any" = load_policy, close: "Any" = lock) -> None:
    """One whole exchange on a connected socket. load, close: otherwise in ``policyd``, which has the policy and rehearses."""
    hello = Hello(wire.receive(sock, wire.HELLO)[0])
    try:
        policy, program, credentials = load(hello)
    except (OSError, ValueError) as error:
        wire.receive(sock, wire.REQUEST)
        text = f"{hello.policy}: {error}" if isinstance(error, OSError) else str(error)
        wire.send(sock, wire.DECISION, decide.refusal(model.Refusal(202, "NW-POLICY-LOAD", text + "; run 'nodewrap policy apply'")))
        return
    caller = decide.Caller(hello.uid, hello.gid, policy)
    close(program)
    answer(sock, caller, policy, credentials)


def main() -> None:
    """The script that the launcher starts: the exchange is on descriptor 3. Leaves without teardown: there is nothing to tear down."""
    try:
        serve(_socket.socket(fileno=3))
    except (wire.WireError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        os._exit(1)
    os._exit(0)

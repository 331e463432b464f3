"""A site of the pilot's own, for attacks on credentials, policy and audit: the node's real programs (userns launcher, policy child) with another
guard and policy, other trust anchors and another log, so that nothing of the node's own is changed for an attack."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodewrap import _paths
from nodewrap.audit.log import entries, lines
from nodewrap.escape.arena import Arena, Live, NotRunError, Ran
from nodewrap.escape.wrappers import Wrapper
from nodewrap.guard import parse_guard
from nodewrap.policy import accounts, install, source
from nodewrap.policy import compile as compiler

POLICY = """
[site]
name = "ESCAPE"
multi_user = "yes"
modes = {{ map = "allow", log-only = "allow" }}
minimum_assurance = "{assurance}"
[[caller]]
uid = "{uid}"
{more}
[[rule]]
name = "all"
when = {{ {when} }}
identity = {{ mode = "log-only" }}
profile = ["none", "strict"]
"""
#: Command of most attacks here: that it ran at all is the answer.
HELLO = ("/bin/echo", "in")


@dataclass(frozen=True)
class Answer:
    """What came of one request. started: the payload ran. code: of the refusal (``NW-…``), "" for none."""

    ran: Ran

    @property
    def started(self) -> bool:
        return self.ran.started

    @property
    def code(self) -> str:
        found = re.search(rb"NW-[A-Z0-9-]+", self.ran.err)
        return found[0].decode() if found and not self.started else ""

    @property
    def word(self) -> str:
        return "started" if self.started else self.code or self.ran.line


class OwnSite:
    """directory: of all of it, the pilot's. Needs the installation of arena.wrapper: not for controls. guard: further or changed lines of its guard,
    "" takes one out. Raises NotRunError when the policy is refused."""

    def __init__(self, arena: Arena, trust: tuple[Path, Path] | None = None, directory: str = "site", **guard: str) -> None:
        at = arena.wrapper.configuration
        assert at is not None
        self.arena, self.files = arena, 0
        self.directory = arena.mkdir(arena.home / directory, 0o755)
        for name in ("policy", "state", "state/leases"):
            arena.mkdir(self.directory / name, 0o700)
        known = parse_guard(Path(at.guard).read_bytes())
        anchors = {"ca-dir": str(trust[0]), "voms-dir": str(trust[1])} if trust else {}
        self.lines = {
            "launcher": "userns", "python": known.python, "script": known.script, "policy": f"{self.directory}/policy/current",
            "state": f"{self.directory}/state", "audit": str(self.audit), "caller-uid": f"{arena.caller.uid}-{arena.caller.uid}", **anchors,
            "allow": "log-only strict none",
        }
        self.guard(**guard)
        if problems := self.apply(self.text()):
            raise NotRunError(f"the policy of the attack: {problems[0]}")
        binary = at.binary
        self.wrapper = Wrapper(f"{arena.wrapper.name} (own site)", lambda words, _, options: [binary, "run", *options, "--", *words], status=True)

    @property
    def audit(self) -> Path:
        return self.directory / "audit.jsonl"

    @property
    def guard_file(self) -> Path:
        return self.directory / "guard"

    def text(self, more: str = "", assurance: str = "none", when: str = "") -> str:
        """A policy that lets everybody in whom more (tables of TOML) does not keep out."""
        return POLICY.format(uid=self.arena.caller.uid, more=more, assurance=assurance, when=when)

    def write(self, path: Path, text: str | bytes, mode: int = 0o600) -> Path:
        """A file of the pilot's, replaced in one step."""
        new = path.with_name(path.name + ".new")
        new.write_bytes(text if isinstance(text, bytes) else text.encode())
        new.chmod(mode)
        self.arena.own(new)
        new.rename(path)
        return path

    def guard(self, **changes: str) -> None:
        """Write the guard, with these lines changed ("ca_dir" for ca-dir) or, where "", left out."""
        known = {**self.lines, **{key.replace("_", "-"): text for key, text in changes.items()}}
        self.write(self.guard_file, "nodewrap-guard 1\n" + "".join(f"{key} {text}\n" for key, text in known.items() if text), 0o644)

    def apply(self, text: str) -> list[str]:
        """Put that policy in force; what the compiler has against it, [] when it is in force now. As the pilot: its owner is who must be trusted."""
        self.write(self.directory / "nodewrap.toml", text, 0o644)
        shipped = source.read_file(str(_shipped()))

        def work() -> str:
            os.umask(0o022)
            sources = source.read(str(self.directory))
            compiled = compiler.compile_policy(sources, shipped, accounts.lookup)
            if compiled is not None:
                install.install(str(self.directory / "policy"), compiled)
                return ""
            return "\n".join(map(str, sources.problems)) or "refused"

        return as_pilot(self.arena, work).splitlines()

    def begin(self, *command: str, options: Sequence[str] = (), env: dict[str, str] | None = None, **more: Any) -> Live:
        """Start command through it; no --mode and --profile are asked for."""
        where = {"NODEWRAP_GUARD": str(self.guard_file)}
        return self.arena.like(self.wrapper).begin(*command, options=options, env={**(env or {}), **where}, **more)

    def run(self, *command: str, **more: Any) -> Answer:
        return Answer(self.begin(*(command or HELLO), **more).end())

    def declared(self, dn: str, vo: str = "testvo", *command: str, **more: Any) -> Answer:
        """A run of that subject's."""
        return self.run(*command, options=["--declare", f"subject={dn}", "--declare", f"vo={vo}", *more.pop("options", ())], **more)

    def credential(self, pem: bytes, *command: str, **more: Any) -> Answer:
        """A run with that proxy file."""
        return Answer(self.presented(pem, *command, **more).end())

    def presented(self, pem: bytes, *command: str, **more: Any) -> Live:
        """The same, while it runs."""
        self.files += 1
        path = self.write(self.directory / f"proxy-{self.files}.pem", pem)
        return self.begin(*(command or HELLO), options=["--credential", str(path), *more.pop("options", ())], **more)

    def records(self) -> list[dict[str, Any]]:
        if not self.audit.exists():
            return []
        with open(self.audit, "rb") as file:
            return [entry.record for entry in entries(lines(file)) if entry.record]


def as_pilot(arena: Arena, work: Callable[[], str]) -> str:
    """What work says, done as the pilot in a child. Raises RuntimeError with its error."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if arena.is_root:
                os.setgroups(list(arena.caller.groups))
                os.setresgid(*[arena.caller.gid] * 3)
                os.setresuid(*[arena.caller.uid] * 3)
            os.write(writer, b"+" + work().encode())
        except BaseException as wrong:  # noqa: BLE001 (told by the parent)
            os.write(writer, f"-{type(wrong).__name__}: {wrong}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read().decode()
    os.waitpid(pid, 0)
    if not said.startswith("+"):
        raise RuntimeError(said[1:])
    return said[1:]


def _shipped() -> Path:
    """profiles.toml: as installed, or in a checkout."""
    places = [Path(_paths.SYSCONFDIR) / "profiles.toml", Path(_paths.SITE) / "policies/profiles.toml"]
    return next((place for place in places if place.exists()), places[0])

"""glexec's own command line and environment, read as glexec 0.9 did, so that old pilots need no change. docs/glexec.md is the reference.

Hot path. Differences that are meant: a relative ``GLEXEC_CLIENT_CERT`` is taken from the current directory (the gLite test suite does that),
and a command behind a symbolic link is run (on today's systems /bin is one).
"""

from nodewrap import __version__, model, usage

HELP = """usage: glexec COMMAND [ARGUMENT…]     run COMMAND (absolute path) as the user of the proxy in GLEXEC_CLIENT_CERT
       glexec                          only copy GLEXEC_SOURCE_PROXY to GLEXEC_TARGET_PROXY
       glexec -h | -v

environment: GLEXEC_CLIENT_CERT   the payload's proxy, yours and readable by you alone
             GLEXEC_SOURCE_PROXY  the proxy to copy to the payload (default: GLEXEC_CLIENT_CERT)
             GLEXEC_TARGET_PROXY  where the copy goes (default: /tmp/x509up_u<uid>.glexec.<n>; /dev/null: no copy)
             GLEXEC_MODE          lcmaps_get_account (default), or lcmaps_verify_account: glexec UID GID COMMAND [ARGUMENT…]
             GLEXEC_ID            text for the record

exit status: the command's; 201 your mistake, 202 internal, 203 not authorised, 204 the command itself ended with 201-204,
  126 cannot execute, 127 not found, 128+N ended by signal N
"""

#: Directories made by mkgltempdir: the pilot's, with the payload's own one inside.
TEMP_PREFIX = "gltmp."
EXPOSE_MAX = 32
NO_COPY = "/dev/null"

#: The highest account: (uid_t)-1 means "no change" to setresuid(2), -2 is nobody's (nodewrap/guard.py has the same bound).
ID_MAX = 2**32 - 3

#: What ends a path inside a word: blanks, quotes and the shell's own characters, so that ``sh -c 'cd /x/gltmp.y/target && …'`` is understood.
_ENDS = {ord(char): " " for char in "\t\n\r\v\f'\"`;:,&|()<>{}[]=$*?!#\\"}


def parse(argv: list[bytes], env: list[bytes], cwd: bytes) -> model.Ask:
    """As request.parse, for a caller that used the name glexec.

    ``ask.argv_from == len(argv)``: there is no command, only the target proxy is written. ``ask.declared["account"] == ["UID:GID"]``: the caller
    wants the mapping to be exactly that account, see ``verify``. ``ask.expose``: mkgltempdir's directories named in target proxy or command.
    """
    _say(argv)
    ask = model.Ask("glexec")
    ask.credential = _file(env, b"GLEXEC_CLIENT_CERT", cwd)
    ask.source_proxy = ask.credential if usage.lookup(env, b"GLEXEC_SOURCE_PROXY") is None else _file(env, b"GLEXEC_SOURCE_PROXY", cwd)
    ask.target_proxy = _target(env)
    ask.declared_id = neutral(usage.lookup(env, b"GLEXEC_ID") or "", usage.CLAIM_BYTES)
    ask.argv_from = _account(ask, argv, usage.lookup(env, b"GLEXEC_MODE"))
    _command(argv[ask.argv_from:], ask.target_proxy)
    ask.expose = temp_directories([ask.target_proxy] + [usage.decode(word) for word in argv[ask.argv_from:]])
    return ask


def target_proxy(ask: model.Ask, uid: int, unique: int) -> str:
    """Where the payload's proxy goes once its uid is known: what was asked for, "" for no copy, else glexec's default name."""
    if ask.target_proxy == NO_COPY:
        return ""
    return ask.target_proxy or f"/tmp/x509up_u{uid}.glexec.{unique}"  # noqa: S108  glexec's default; written as the payload, in its view


def verify(ask: model.Ask, uid: int, gid: int) -> None:
    """The promise of ``GLEXEC_MODE=lcmaps_verify_account``: raises model.Refusal 203 when the mapping gave another account than asked for."""
    asked = ask.declared.get("account", [f"{uid}:{gid}"])[0]
    if asked != f"{uid}:{gid}":
        raise model.Refusal(203, "NW-GLEXEC-VERIFY", f"the mapping gives account {uid}:{gid}, the caller asked to verify {asked}")


def line(caller: str, caller_group: str, account: str, account_group: str, cwd: str, command: list[str]) -> str:
    """The syslog line that glexec wrote at the start of a payload (reference: ``glexec: real_user(…)…``), one line of printable ASCII.

    command: the payload's argv; [] when only the proxy is refreshed. At most about 900 bytes: syslog lines end at 1,024 (RFC 3164, 4.1).
    """
    cmd, words = neutral("".join(command[:1]), 160), neutral(" ".join(command[1:]), 256)
    real = f"real_user({neutral(caller, 32)}),real_group({neutral(caller_group, 32)})"
    mapped = f"mapped_user({neutral(account, 32)}),mapped_group({neutral(account_group, 32)})"
    start = f'{real}->{mapped} cwd: "{neutral(cwd, 96)}" cmd: "{cmd}" (="{cmd}")'
    return f'{start} args: "{words}"' if len(command) > 1 else start


def neutral(value: str, limit: int) -> str:
    """value as printable ASCII of at most limit characters, in which no quote or line can be forged: anything else is ``?``."""
    safe = "".join(char if " " <= char <= "~" and char not in '"\\' else "?" for char in value[:limit + 1])
    return safe if len(safe) <= limit else safe[:limit - 3] + "..."


def temp_directories(words: list[str]) -> list[str]:
    """The directories ``…/gltmp.NAME`` that paths in the words lead through, each once, in order; at most EXPOSE_MAX.

    The launcher opens each as the caller and wants it to be the caller's own, so naming one gives nothing that the caller has not.
    """
    found = []
    for word in words:
        if "/" + TEMP_PREFIX not in word:
            continue
        found += [top for top in map(_temp_directory, word.translate(_ENDS).split()) if top]
    return list(dict.fromkeys(found))[:EXPOSE_MAX]


def _temp_directory(word: str) -> str:
    """``/a/gltmp.x`` for ``/a/gltmp.x/y``; "" when word is no clean absolute path with such a component."""
    parts = word.split("/")
    at = next((i for i, part in enumerate(parts) if part.startswith(TEMP_PREFIX)), 0)
    head = parts[1:at + 1]
    clean = parts[0] == "" and at > 0 and not any(part in ("", ".", "..") for part in head)
    return "/" + "/".join(head) if clean else ""


def _say(argv: list[bytes]) -> None:
    first = b"".join(argv[1:2])
    if first == b"-h":
        raise model.Say(0, HELP)
    if first == b"-v":
        raise model.Say(0, f"glexec version 0.9 (drop-in of nodewrap {__version__})\n")
    if first.startswith(b"-"):
        raise usage.mistake("OPTION", f"unknown option {usage.shown(usage.decode(first))}; glexec takes -h, -v, or a command with its absolute path")


def _file(env: list[bytes], name: bytes, cwd: bytes) -> str:
    """A credential's path; absent and empty are both the caller's mistake, 201 (Nikhef wiki, Exit codes of gLExec)."""
    value = usage.lookup(env, name)
    if not value:
        raise usage.mistake("PROXY", f"{name.decode()} is {'not set' if value is None else 'empty'}; set it to the path of the payload's proxy")
    return usage.path(name.decode(), value, cwd)


def _target(env: list[bytes]) -> str:
    value = usage.lookup(env, b"GLEXEC_TARGET_PROXY")
    if value is None:
        return ""
    if not value.startswith("/") or value.endswith("/"):
        raise usage.mistake("TARGET", f"GLEXEC_TARGET_PROXY: {usage.shown(value)} is not the absolute path of a file")
    return usage.path("GLEXEC_TARGET_PROXY", value, b"")


def _account(ask: model.Ask, argv: list[bytes], mode: "str | None") -> int:
    """Index at which the command starts: 1, or 3 behind the UID GID of the verify form."""
    if mode in (None, "", "lcmaps_get_account"):
        return 1
    if mode != "lcmaps_verify_account":
        raise usage.mistake("MODE", f"GLEXEC_MODE: {usage.shown(mode or '')} is neither lcmaps_get_account nor lcmaps_verify_account")
    if len(argv) < 4:
        raise usage.mistake("COMMAND", "GLEXEC_MODE=lcmaps_verify_account needs: glexec UID GID COMMAND [ARGUMENT…]")
    uid, gid = (usage.number(what, usage.decode(word), 1, ID_MAX) for what, word in zip(("UID", "GID"), argv[1:3]))
    ask.declared["account"] = [f"{uid}:{gid}"]
    return 3


def _command(words: list[bytes], target: str) -> None:
    """A command, when there is one, is an absolute path in its plain form: glexec never searched PATH."""
    if not words and target == NO_COPY:
        raise usage.mistake("COMMAND", f"there is no command, and GLEXEC_TARGET_PROXY={NO_COPY} wants no copy; give one of them")
    if not words:
        return
    parts = words[0].split(b"/")
    if parts[0] or len(parts) < 2 or any(part in (b"", b".", b"..") for part in parts[1:]):
        name = usage.shown(usage.decode(words[0]))
        raise usage.mistake("COMMAND", f"command {name} is not an absolute path without . and .. (readlink -f gives it)")
    if len(words[0]) > usage.PATH_BYTES:
        raise usage.mistake("COMMAND", f"the command's path is longer than {usage.PATH_BYTES} bytes; use a shorter one")

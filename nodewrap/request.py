"""What the pilot typed, made into a model.Ask. Nothing is believed here and nothing is opened; the payload's own words are not touched.

The launcher hands argv, environment and working directory over as bytes (docs/wire.md, REQUEST). The name the program was called by chooses
the style: ``glexec`` is the drop-in (nodewrap/glexec.py), every other name is ``nodewrap run``. It never chooses a mode or a right (attack A23).
"""

from nodewrap import __version__, environment, glexec, model, usage

HELP = """usage: nodewrap run [OPTION…] [--] COMMAND [ARGUMENT…]

Run COMMAND as the payload of a grid user: isolated, under its own identity, cleaned up and on record.
Options are --name value or --name=value, in full; the first word that is no option, or the word after --, starts the command.

who
  --credential FILE    the payload's proxy, yours and readable by you alone; it is verified and handed to the payload
  --declare NAME=TEXT  say who it is when there is no credential: subject=DN, vo=NAME, fqan=/VO/… (fqan may be repeated)
  --job-id TEXT        your name for this job, for the record (at most 256 bytes)
how
  --mode MODE          switch, map or log-only; only what the site's policy allows
  --profile NAME       strict, batch, compat, none, or another one that the site has
  --wall TIME          end the payload after TIME: seconds, or a number with s, m, h or d
where
  --workdir DIR        your directory that becomes the payload's, seen at the same path, and its current directory
  --expose DIR         another directory of yours to be seen inside (may be repeated)
  --image IMG          run in a container of this image: a SIF file or a directory, one that the site's policy allows
  --env NAME=VALUE     set a variable for the payload (may be repeated)
answer
  --status-fd N        write what happens to descriptor N (3 or higher), one JSON object a line
  --help, --version

exit status: the payload's; 201 your mistake, 202 internal, 203 not authorised, 204 the payload itself ended with 201-204,
  126 cannot execute, 127 not found, 128+N ended by signal N
"""

MODES = ("switch", "map", "log-only")

#: Options that the architecture (section 7) has and this version has not, with what serves instead.
LATER = {
    "--token": "--credential or --declare", "--envelope": "--credential or --declare", "--input": "--workdir or --expose", "--output": "--workdir",
}
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
WALL_MAX = 366 * 86400
FD_MAX = 255  # the launcher knows which of the first 256 descriptors the caller gave it (NW_STATUS_FDS in csrc/run.h)
ENV_MAX, EXPOSE_MAX, FQAN_MAX = 256, 32, 64


def parse(argv: list[bytes], env: list[bytes], cwd: bytes) -> model.Ask:
    """argv from 0, environment entries and working directory (b"" when not known) of the caller -> what it asks for.

    The payload's command is ``argv[ask.argv_from:]``. Raises model.Refusal (201, ``NW-USAGE-…`` or ``NW-OPTION``) and model.Say (help, version).
    """
    if not argv:
        raise usage.mistake("ARGV", "called without a name (argc is 0); call it as: nodewrap run -- COMMAND")  # CVE-2021-4034
    if b"\0" in b"".join(argv):
        raise usage.mistake("ARGV", "an argument contains a NUL byte; no program can be started with it")
    if argv[0].rpartition(b"/")[2] == b"glexec":
        return glexec.parse(argv, env, cwd)
    return _run(argv, cwd)


def _run(argv: list[bytes], cwd: bytes) -> model.Ask:
    if argv[1:2] in ([b"--help"], [b"-h"]):
        raise model.Say(0, HELP)
    if argv[1:2] == [b"--version"]:
        raise model.Say(0, f"nodewrap {__version__}\n")
    if argv[1:2] != [b"run"]:
        raise usage.mistake("VERB", "the launcher only knows 'run'; call it as: nodewrap run [OPTION…] -- COMMAND (see nodewrap run --help)")
    ask = model.Ask("run")
    ask.argv_from = _options(ask, argv, cwd)
    if argv[ask.argv_from:ask.argv_from + 1] in ([], [b""]):
        raise usage.mistake("COMMAND", "there is no command to run; put it behind the options: nodewrap run [OPTION…] -- COMMAND")
    ask.search = b"/" not in argv[ask.argv_from]
    ask.source_proxy = ask.credential
    return ask


def _options(ask: model.Ask, argv: list[bytes], cwd: bytes) -> int:
    """Read options from argv[2] on into ask; returns the index at which the command starts."""
    seen: set[str] = set()
    at = 2
    while at < len(argv) and argv[at].startswith(b"-"):
        if argv[at] == b"--":
            return at + 1
        name, glued, value = usage.decode(argv[at]).partition("=")
        _check(name, seen)
        if not glued:
            at += 1
            value = _next(name, argv, at)
        OPTIONS[name](ask, value, cwd)
        at += 1
    return at


def _check(name: str, seen: "set[str]") -> None:
    """name is an option that may stand here, else Refusal or Say."""
    if name in ("--help", "-h"):
        raise model.Say(0, HELP)
    if name == "--version":
        raise model.Say(0, f"nodewrap {__version__}\n")
    if name in LATER:
        raise model.Refusal(201, "NW-OPTION", f"nodewrap {__version__} has no {name}; use {LATER[name]}")
    if name not in OPTIONS:
        raise usage.mistake("OPTION", f"unknown option {usage.shown(name)}; see nodewrap run --help (options are not abbreviated)")
    if name in seen and name not in REPEATED:
        raise usage.mistake("OPTION", f"{name} is given twice; give it once")
    seen.add(name)


def _next(name: str, argv: list[bytes], at: int) -> str:
    if at == len(argv):
        raise usage.mistake("OPTION", f"{name} needs a value: {name} VALUE or {name}=VALUE")
    return usage.decode(argv[at])


def _mode(ask: model.Ask, value: str, cwd: bytes) -> None:
    if value not in MODES:
        raise usage.mistake("MODE", f"--mode: {usage.shown(value)} is none of {', '.join(MODES)}")
    ask.mode = value


def _profile(ask: model.Ask, value: str, cwd: bytes) -> None:
    if not value.isascii() or not value.replace("-", "a").replace("_", "a").isalnum() or len(value) > 64:
        raise usage.mistake("PROFILE", f"--profile: {usage.shown(value)} is no profile name (letters, digits, - and _, at most 64)")
    ask.profile = value


def _credential(ask: model.Ask, value: str, cwd: bytes) -> None:
    ask.credential = usage.path("--credential", value, cwd)


def _declare(ask: model.Ask, value: str, cwd: bytes) -> None:
    name, _, said = value.partition("=")
    if name not in ("subject", "vo", "fqan"):
        raise usage.mistake("DECLARE", f"--declare: {usage.shown(name)} is none of subject, vo, fqan; write --declare subject=/DC=…/CN=…")
    said = usage.claim(f"--declare {name}", said)
    if name != "vo" and not said.startswith("/"):
        raise usage.mistake("DECLARE", f"--declare {name}: {usage.shown(said)} does not start with '/'; write it as /…/…")
    claims = ask.declared.setdefault(name, [])
    if len(claims) >= (FQAN_MAX if name == "fqan" else 1):
        raise usage.mistake("DECLARE", f"--declare {name} is given too often; at most {len(claims)} of it")
    claims.append(said)


def _workdir(ask: model.Ask, value: str, cwd: bytes) -> None:
    ask.workdir = _directory("--workdir", value, cwd)


def _image(ask: model.Ask, value: str, cwd: bytes) -> None:
    ask.image = _directory("--image", value, cwd)


def _expose(ask: model.Ask, value: str, cwd: bytes) -> None:
    if len(ask.expose) >= EXPOSE_MAX:
        raise usage.mistake("LIMIT", f"--expose is given more than {EXPOSE_MAX} times; expose a directory above them")
    ask.expose.append(_directory("--expose", value, cwd))


def _directory(where: str, value: str, cwd: bytes) -> str:
    clean = usage.path(where, value, cwd)
    if clean == "/":
        raise usage.mistake("PATH", f"{where}: '/' cannot be the payload's; name a directory of your own")
    return clean


def _env(ask: model.Ask, value: str, cwd: bytes) -> None:
    name, mark, said = value.partition("=")
    if not mark or not name.isascii() or not name.isidentifier():
        raise usage.mistake("ENV", f"--env: {usage.shown(value)} is not NAME=VALUE (letters, digits and _, no digit first)")
    if environment.never(name) or environment.function(said):
        raise usage.mistake("ENV", f"--env: {name} cannot be passed to a payload; let the command set it: /usr/bin/env {name}=… COMMAND")
    if any(entry.startswith(name + "=") for entry in ask.env_set):
        raise usage.mistake("ENV", f"--env: {name} is given twice; give it once")
    if len(ask.env_set) >= ENV_MAX:
        raise usage.mistake("LIMIT", f"--env is given more than {ENV_MAX} times; let the command read a file")
    ask.env_set.append(value)


def _status_fd(ask: model.Ask, value: str, cwd: bytes) -> None:
    ask.status_fd = usage.number("--status-fd", value, 3, FD_MAX)  # 0, 1 and 2 are the payload's, byte for byte (I14)


def _job_id(ask: model.Ask, value: str, cwd: bytes) -> None:
    ask.job_id = usage.claim("--job-id", value)


def _wall(ask: model.Ask, value: str, cwd: bytes) -> None:
    unit = UNITS.get(value[-1:], 0)
    digits = value[:-1] if unit else value
    ask.wall_s = usage.number("--wall", digits, 1, WALL_MAX // (unit or 1)) * (unit or 1)


REPEATED = frozenset(("--declare", "--env", "--expose"))
OPTIONS = {
    "--mode": _mode, "--profile": _profile, "--credential": _credential, "--declare": _declare, "--workdir": _workdir, "--expose": _expose,
    "--image": _image, "--env": _env, "--status-fd": _status_fd, "--job-id": _job_id, "--wall": _wall,
}

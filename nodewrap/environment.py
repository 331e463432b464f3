"""Which variables the payload gets: what the policy keeps, what is set, and what never passes.

Hot path. The rules, in order of strength:

1. A name that ``never`` bans does not reach the payload, whichever door it comes through.
2. ``USER``, ``LOGNAME`` and ``X509_USER_PROXY`` say who the payload is and which proxy is its own; nobody overrides them.
3. The policy's ``set``, then the caller's ``--env``, then the defaults ``PATH``, ``HOME``, ``TMPDIR``.
4. An inherited entry stays when a ``keep`` pattern matches and no ``strip`` pattern does; in glexec style ``GLEXEC_*`` stays too.

Patterns are names in which ``*`` stands for any run of characters. Entries without ``=``, with an empty name, or with a value that starts with ``()``
(an exported shell function, CVE-2014-6271) are dropped. Of entries with the same name the first counts, as for getenv(3), even when it is dropped:
otherwise a program that scans the other way round would see what was hidden behind it.
"""

from nodewrap import model, usage
from nodewrap.policy import names

DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
TMP = "/tmp"  # noqa: S108  a name inside the payload's view, where it is private

#: Code runs, or files are chosen, by the word of the environment: glibc's own list for setuid programs (sysdeps/generic/unsecvars.h), sudo's
#: initial_badenv_table (env.c), and the start-up hooks of shells, interpreters and OpenSSL.
HOOKS = frozenset((
    "BASHOPTS", "BASH_ENV", "CDPATH", "ENV", "FPATH", "GCONV_PATH", "GETCONF_DIR", "GLIBC_TUNABLES", "GLOBIGNORE", "HOSTALIASES", "IFS",
    "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "LOCALDOMAIN", "LOCPATH", "NIS_PATH", "NLSPATH", "NODE_OPTIONS", "NODE_PATH", "NULLCMD", "OPENSSL_CONF",
    "OPENSSL_ENGINES", "OPENSSL_MODULES", "PATH_LOCALE", "PERLIO_DEBUG", "PERLLIB", "PROMPT_COMMAND", "PS4", "READNULLCMD", "RESOLV_HOST_CONF",
    "RES_OPTIONS", "RUBYLIB", "RUBYOPT", "SHELLOPTS", "SSLKEYLOGFILE", "TERMCAP", "TERMINFO", "TERMINFO_DIRS", "TERMPATH", "TMPPREFIX", "TZDIR",
    "ZDOTDIR", "_JAVA_OPTIONS",
))
HOOK_PREFIXES = ("BASH_FUNC_", "DYLD_", "LD_", "MALLOC_", "PERL5", "PYTHON", "_RLD")

#: The pilot's own secrets, or the way to them (I10). SSL_CLIENT_CERT carries PEM text with a key.
SECRETS = frozenset(("GPG_AGENT_INFO", "SSH_AGENT_PID", "SSH_AUTH_SOCK", "SSL_CLIENT_CERT", "X509_USER_CERT", "X509_USER_KEY", "X509_USER_PROXY"))
SECRET_PREFIXES = ("BEARER_TOKEN", "JALIEN_TOKEN_")


def never(name: str) -> bool:
    """True when no policy and no option may pass this variable to a payload. ``policy apply`` refuses such names by this too."""
    return name in HOOKS or name in SECRETS or name.startswith(HOOK_PREFIXES) or name.startswith(SECRET_PREFIXES)


def function(value: "str | bytes") -> bool:
    """True for the value of an exported shell function: ``() { …``."""
    return value[:2] in ("()", b"()")


class Patterns:
    """Names with ``*`` in them, sorted once into what is cheap to ask: exact names, prefixes, the rest."""

    __slots__ = ("exact", "prefixes", "rest")

    def __init__(self, patterns: list[str]) -> None:
        self.exact = {p for p in patterns if "*" not in p}
        self.prefixes = tuple(p[:-1] for p in patterns if p.find("*") == len(p) - 1)
        self.rest = [p.split("*") for p in patterns if 0 <= p.find("*") < len(p) - 1]

    def match(self, name: str) -> bool:
        """True when one of the patterns matches the whole name."""
        return name in self.exact or name.startswith(self.prefixes) or any(names.glob(parts, name) for parts in self.rest)


#: Sorted already, by what the policy says: the resident policy child's rehearsals do it for all of its workers.
_SORTED: "dict[tuple[str, ...], Patterns]" = {}


def _patterns(patterns: list[str]) -> Patterns:
    key = tuple(patterns)
    found = _SORTED.get(key)
    if found is None:
        found = _SORTED[key] = Patterns(patterns)
    return found


def environment(
    policy_env: "dict[str, object]", ask: model.Ask, env: list[bytes], home: str, name: str, target_proxy: str,
) -> "tuple[list[int], list[str]]":
    """The payload's environment as DECISION says it: indices of env to keep, and ``NAME=value`` to set; no name occurs twice.

    policy_env: ``{"keep": [pattern…], "strip": [pattern…], "set": {NAME: value}}``, each key optional. env: entries as inherited.
    home: the payload's home, "" when it has none. name: its account name or "". target_proxy: where its proxy is, "" or "/dev/null" for none.
    Raises model.Refusal 202 ``NW-ENV-POLICY`` when the policy has another shape, or sets a banned name.
    """
    new = _set(_table(policy_env), ask.env_set, home, name, target_proxy)
    keep = _patterns(_list(policy_env, "keep") + (["GLEXEC_*"] if ask.style == "glexec" else []))
    return _keep(env, keep, _patterns(_list(policy_env, "strip")), set(new)), [f"{key}={value}" for key, value in new.items()]


def _set(site: "dict[str, str]", asked: list[str], home: str, name: str, target_proxy: str) -> "dict[str, str]":
    new = {"PATH": DEFAULT_PATH, "HOME": home or TMP, "TMPDIR": TMP}
    for entry in asked:
        key, _, value = entry.partition("=")
        new[key] = value
    new.update(site)
    # request.py refuses a banned --env already; this is the last door.
    new = {key: value for key, value in new.items() if not never(key) and not function(value)}
    if name:
        new.update(USER=name, LOGNAME=name)
    if target_proxy not in ("", "/dev/null"):
        new["X509_USER_PROXY"] = target_proxy
    return new


def _keep(env: list[bytes], keep: Patterns, strip: Patterns, taken: "set[str]") -> list[int]:
    indices = []
    for index, entry in enumerate(env):
        raw, mark, value = entry.partition(b"=")
        name = usage.decode(raw)
        if not mark or not name or name in taken:
            continue
        taken.add(name)
        if keep.match(name) and not strip.match(name) and not never(name) and not function(value):
            indices.append(index)
    return indices


def _list(policy_env: "dict[str, object]", key: str) -> list[str]:
    found = policy_env.get(key, [])
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise model.Refusal(202, "NW-ENV-POLICY", f"the applied policy's env.{key} is not a list of names; run nodewrap policy apply again")
    return found


def _table(policy_env: "dict[str, object]") -> "dict[str, str]":
    found = policy_env.get("set", {})
    if not isinstance(found, dict) or not all(isinstance(key, str) and isinstance(value, str) for key, value in found.items()):
        raise model.Refusal(202, "NW-ENV-POLICY", "the applied policy's env.set is not a table of strings; run nodewrap policy apply again")
    for key, value in found.items():
        if never(key) or function(value) or not key or "=" in key or "\0" in key + value:
            raise model.Refusal(202, "NW-ENV-POLICY", f"the applied policy sets {usage.shown(key)}, which no payload may get; take it out of env.set")
    return found

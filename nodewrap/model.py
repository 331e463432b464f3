"""The nouns that travel between the parts of the policy child.

Plain classes with ``__slots__``: this module is on the hot path, and ``dataclasses`` alone costs 14 ms to import.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Refusal(Exception):
    """A request ends here: ``code`` (``NW-…``), one line of ``text``, and the exit status that the pilot gets.

    ``exit`` is 201 (caller's mistake), 202 (internal), 203 (not authorised); architecture section 7.
    """

    def __init__(self, exit: int, code: str, text: str, alarm: bool = False) -> None:
        super().__init__(text)
        self.exit = exit
        self.code = code
        self.text = text
        self.alarm = alarm


class Say(Exception):
    """Not a run: print ``text`` on stdout and leave with ``exit`` (``--help``, ``glexec -v``)."""

    def __init__(self, exit: int, text: str) -> None:
        super().__init__(text)
        self.exit = exit
        self.text = text


#: Who vouches for the subject, weakest first (architecture section 2).
ASSURANCE = ("none", "declared", "credential", "signed", "bound")


class Subject:
    """Whose payload it is.

    dn: OpenSSL one-line form of the end-entity certificate's subject, ``/DC=…/CN=…``, or "".
    issuer: one-line DN of the CA, or the token issuer. sub: token subject or "". vo: "" when unknown.
    fqans: in the order of the attribute certificate. assurance: one of ASSURANCE.
    expires: seconds since 1970 (UTC) at which the first link of the evidence ends, 0 when nothing expires.
    serial: decimal serial of the end-entity certificate, or "". kind: ``rfc``, ``legacy``, ``gt3``, ``eec``, ``declared``, "".
    limited: a limited proxy is in the chain. has_key: the private key came along and matches.
    fingerprint: SHA-256 hex of the leaf certificate's DER, or "": two files with the same one are the same credential.
    notes: what was tolerated, for the record (e.g. "no CRL for …").
    """

    __slots__ = ("assurance", "dn", "expires", "fingerprint", "fqans", "has_key", "issuer", "kind", "limited", "notes", "serial", "sub", "vo")

    def __init__(self, assurance: str = "none", dn: str = "", vo: str = "") -> None:
        self.assurance = assurance
        self.dn = dn
        self.vo = vo
        self.issuer = ""
        self.sub = ""
        self.fqans: list[str] = []
        self.expires = 0
        self.serial = ""
        self.kind = ""
        self.limited = False
        self.has_key = False
        self.fingerprint = ""
        self.notes: list[str] = []


class Ask:
    """What the pilot asked for, parsed from argv and environment, nothing believed yet.

    style: ``run`` or ``glexec``. mode, profile: "" when not asked for. credential: path of the payload's credential or "".
    source_proxy: path of the proxy to copy to the payload or "". target_proxy: where the copy goes; "" default, "/dev/null" none.
    declared: claims of ``--declare`` by name (subject, vo, fqan: list under "fqan"). workdir: absolute path or "".
    env_set: list of "NAME=value" from ``--env``. status_fd: -1 when absent. job_id: free text or "". declared_id: GLEXEC_ID.
    argv_from: index into argv at which the payload's command starts. search: look the command up in PATH.
    expose: caller's directories to show inside. wall_s: 0 when not asked for. image: absolute path of a container image, or "".
    subject: whose payload it is as far as that is known, assurance ``none`` while a credential is not verified.
    """

    __slots__ = (
        "argv_from", "credential", "declared", "declared_id", "env_set", "expose", "image", "job_id", "mode", "profile",
        "search", "source_proxy", "status_fd", "style", "subject", "target_proxy", "wall_s", "workdir",
    )

    def __init__(self, style: str = "run") -> None:
        self.style = style
        self.mode = ""
        self.profile = ""
        self.credential = ""
        self.source_proxy = ""
        self.target_proxy = ""
        self.declared: dict[str, list[str]] = {}
        self.declared_id = ""
        self.workdir = ""
        self.env_set: list[str] = []
        self.expose: list[str] = []
        self.image = ""
        self.subject = Subject()
        self.status_fd = -1
        self.job_id = ""
        self.argv_from = 0
        self.search = False
        self.wall_s = 0


class Facts:
    """What policy is evaluated on.

    caller: account name ("" when the uid has none); uid, gid: its ids; groups: its group names. host: node name.
    now: seconds since 1970. launcher: ``setuid``, ``userns`` or ``socket``. mode, profile: asked for, or "".
    """

    __slots__ = ("caller", "gid", "groups", "host", "launcher", "mode", "now", "profile", "subject", "uid")

    def __init__(self, caller: str, uid: int, gid: int, subject: Subject, launcher: str, now: int) -> None:
        self.caller = caller
        self.uid = uid
        self.gid = gid
        self.groups: list[str] = []
        self.subject = subject
        self.launcher = launcher
        self.now = now
        self.host = ""
        self.mode = ""
        self.profile = ""


class Verdict:
    """What policy says, and why.

    permit False: ``exit`` (203, or 202), ``code`` and ``text`` say why. steps: every step taken, in order, for ``explain`` and the record.
    rule: name of the deciding rule, ban or stance. identity: see docs/policy.md, "compiled identity". limits: wall_s, grace_s and
    RLIMIT values by number under ``rlimits``. env: ``{"keep": [patterns], "set": {NAME: value}}``. image: the rule's, {} when it has none.
    """

    __slots__ = ("alarm", "code", "env", "exit", "identity", "image", "limits", "mode", "permit", "profile", "rule", "steps", "text")

    def __init__(self) -> None:
        self.permit = False
        self.exit = 203
        self.code = ""
        self.text = ""
        self.rule = ""
        self.mode = ""
        self.profile = ""
        self.identity: dict[str, Any] = {}
        self.limits: dict[str, Any] = {}
        self.env: dict[str, Any] = {}
        self.image: dict[str, Any] = {}
        self.steps: list[str] = []
        self.alarm = False

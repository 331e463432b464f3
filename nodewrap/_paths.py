"""Where nodewrap keeps its things, in a checkout: below ``NODEWRAP_PREFIX``, default ``/usr/local`` with the system's places.

An installed package carries constants instead (``packaging/paths.py.in``), so no environment variable moves an installation's files.
All are absolute paths. SYSCONFDIR: policy sources and guard. STATEDIR: leases, compiled policy. LOGDIR: audit. RUNDIR: sockets.
LIBEXEC: launchers and the policy child's script. SITE: the directory that holds the package. PYTHON: the policy child's interpreter.
"""

import os
import sys

_PREFIX = os.environ.get("NODEWRAP_PREFIX", "/usr/local")
_ROOT = "" if _PREFIX in ("/usr", "/usr/local") else _PREFIX

SYSCONFDIR = os.environ.get("NODEWRAP_SYSCONFDIR", (_ROOT or "") + "/etc/nodewrap")
GUARD = SYSCONFDIR + "/guard"
STATEDIR = _ROOT + "/var/lib/nodewrap"
LOGDIR = _ROOT + "/var/log/nodewrap"
RUNDIR = _ROOT + "/run/nodewrap"
LIBEXEC = _PREFIX + "/libexec/nodewrap"
SITE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHON = os.path.realpath(sys.executable)

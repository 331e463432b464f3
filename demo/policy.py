"""The demonstration's guard and policy: three ways of getting an identity, one ban."""

from __future__ import annotations

from tests import pki, site

TOML = """
[site]
name = "DEMO"
multi_user = "yes"
modes = {{ {switch}map = "allow", log-only = "allow" }}
minimum_assurance = "credential"
[[caller]]
account = ["{pilot}"]
vo = "{vo}"
{rules}
[[rule]]
name = "site-tests"
when = {{ fqan = ["/{vo}/Role=lcgadmin"] }}
identity = {{ mode = "log-only" }}
profile = "strict"
[[rule]]
name = "analysis"
when = {{ fqan = ["/{vo}/analysis"] }}
identity = {{ mode = "map" }}
profile = ["batch", "strict"]
limits = {{ wall = "1h", processes = 200 }}
[[ban]]
dn = "{base}/O=Users/CN=Mallory Intruder"
reason = "incident 2026-113"
"""
POOL = """
[pool.users]
accounts = [{accounts}]
[[rule]]
name = "production"
when = {{ fqan = ["/{vo}/production"] }}
identity = {{ mode = "switch", pool = "users" }}
profile = ["compat", "strict"]
limits = {{ wall = "1h", processes = 200 }}
"""
NO_POOL = """
[[rule]]
name = "production"
when = {{ fqan = ["/{vo}/production"] }}
identity = {{ mode = "map" }}
profile = ["compat", "strict"]
limits = {{ wall = "1h" }}
"""


def map_uids(tag: str) -> range:
    """Ids for mode map: far above accounts and containers' ranges. Each demonstration has its own: of two sites that lease the same
    id on one node, each would end the other's payloads."""
    first = 1_900_000_000 + 100 * int(tag, 16)
    return range(first, first + 100)


def toml(pilot: site.Account, pool: list[site.Account]) -> str:
    accounts = ", ".join(f'"{account.name}"' for account in pool)
    rules = (POOL if pool else NO_POOL).format(accounts=accounts, vo=pki.VO).strip()
    return TOML.format(switch='switch = "allow", ' if pool else "", pilot=pilot.name, vo=pki.VO, base=pki.BASE, rules=rules).lstrip()


def guard(grid: pki.Pki, pilot: site.Account, pool: list[site.Account], leased: range) -> dict[str, object]:
    """Changes to the guard as installed: who may call, whom a payload may become, which anchors are trusted."""
    changes: dict[str, object] = {"caller_uid": f"{pilot.uid}-{pilot.uid}", "ca_dir": str(grid.ca_dir), "voms_dir": str(grid.voms_dir)}
    changes["allow"] = ["map strict batch compat", "log-only strict"]
    if not pool:
        return changes
    ids = f"{min(account.uid for account in pool)}-{max(account.uid for account in pool)}"
    allow = ["switch strict compat", *changes["allow"]]
    return {**changes, "switch_uid": ids, "switch_gid": ids, "map_uid": f"{leased[0]}-{leased[-1]}", "allow": allow}

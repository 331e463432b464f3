"""Profile compat shows the account its home. Whose it is next must not meet what was left there."""

from __future__ import annotations


def test_home_of_a_leased_account_is_empty_private_and_gone_with_the_run(setuid_node):
    home = setuid_node.site.accounts["user1"].home
    ran = setuid_node.sh("static", 'ls -A "$HOME"; echo evil >"$HOME/.bashrc"; stat -c "%U %a" "$HOME"; cat "$HOME/.bashrc"; pwd', profile="compat")
    assert ran.out.decode().split() == [setuid_node.site.accounts["user1"].name, "700", "evil", str(home)]
    assert setuid_node.sh("static", 'ls -A "$HOME"', profile="compat").out == b""
    assert list(home.iterdir()) == []

"""``nodewrap escape-test``: hostile payloads and callers against this node's nodewrap, each shown to work where nothing stops it.

request   ``commands/escape_test.py`` makes the configurations: launcher, mode, profile, and who calls.
attack    ``surfaces/X_*.py``, one function an attack: it prepares, starts the hostile code of ``hostile/X_*.py`` through a wrapper, and judges
          from outside. The same function runs twice: with a wrapper that protects nothing (the control) and with nodewrap.
judge     ``judge.py`` compares the node before and after each run, ``attempt.py`` bounds each one, ``suite.py`` makes the verdict.
report    ``report/``.

``catalogue.tsv`` names all attacks: id, what is tried, what the attacker needs, what it replays, where it can run.
"""

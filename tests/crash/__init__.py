"""The crash matrix: every process of a run killed, and every system call of it failed, at every place; the invariants checked from outside.

nth.c       runs a command under ptrace and ends or disturbs it at a given system call
payload.c   the payload: leaves what a payload may leave
points.py   points, what they are called, which are worth trying
cases.py    a launcher, a kind and a profile, ready to be run again and again
judge.py    the invariants
matrix.py   ``python -m tests.crash.matrix``: chooses points, has them tried by worker.py, counts
soak.py     ``python -m tests.crash.soak``: many runs at once, everything killed at random, disks full; with soak.c as payload
evidence.py what the audit log of a soak must say
"""

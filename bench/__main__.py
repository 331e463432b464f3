"""``python -m bench``: measure, print tables, leave nothing behind. Exit status 0 also when a promise was missed: a shared machine is no judge."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys

from bench import cases, containers, measure, relay, table, trees
from bench.node import Node, apptainer
from tests.site import ROOT

PARTS = ("starts", "mounts", "containers", "relay", "kills", "trees", "memory", "lines")


def main(argv: list[str]) -> int:
    asked = _parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the finally below runs
    say(f"nodewrap bench: Linux {platform.release()} {platform.machine()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    if not ROOT:
        say("not root: the userns launcher alone, records on disk, no kill of a pool account's tree")
    for peer in cases.missing():
        say(f"{peer} is not installed and is left out")
    if asked.realtime:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
        say("under SCHED_FIFO, for what is measured and what it is compared with; trees are left out, they would hold the processors")
    node = Node()
    try:
        if ROOT and not node.places["setuid"].networks:
            say("private networks are left out: there is no nft, or net.ipv4.ip_forward is 0")
        others = working_peers(node)
        for part in asked.only or [part for part in PARTS if not (asked.realtime and part in ("kills", "trees"))]:
            run(part, node, others, asked)
    finally:
        node.close()
    return 0


def working_peers(node: Node) -> list[cases.Case]:
    found = []
    for case in cases.peers(node):
        why = measure.refused(node, case)
        if why:
            say(f"{case.name} does not work here and is left out: {why}")
        else:
            found.append(case)
    return found


def run(part: str, node: Node, others: list[cases.Case], asked: argparse.Namespace) -> None:
    if part == "starts":
        chosen = [case for case in cases.start_cases(node, others) if case.name == cases.BARE or asked.match in case.name]
        show(f"Start to exit of /bin/true, {asked.runs} rounds", table.of_starts(measure.starts(node, chosen, asked.runs)))
    elif part == "mounts" and ROOT:
        times = measure.starts(node, cases.mount_cases(node, others), asked.runs, asked.mounts)
        show(f"The same with {asked.mounts} more mounts on the host", table.of_starts(times))
    elif part == "containers" and not apptainer():
        say("Apptainer or busybox is not installed: containers are left out")
    elif part == "containers":
        show("/bin/true in a container, medians", table.of_containers(containers.costs(node, asked.containers)))
    elif part == "relay":
        show(f"{relay.SIZE >> 20} MiB through stdin or stdout", table.of_flows(relay.flows(node, asked.flows)))
        show("Processor time while a payload waits, files as stdio", table.of_idle(relay.idle(node)))
    elif part == "kills" and ROOT:
        show("A tree and its end: from the order to the proof that nothing is left", table.of_kills(measure.kills(node, asked.kills)))
    elif part == "trees":
        for name, where, shapes in trees.places():
            show(f"Cleaning large trees {name}, {asked.trees} rounds", table.of_trees(trees.cleaned(where, asked.trees, shapes)))
    elif part == "memory":
        show("Resident memory while a payload sleeps", table.of_memory(measure.memory(node)))
    elif part == "lines":
        show("Size", table.of_lines(*measure.lines_of_c()))


def show(title: str, lines: list[str]) -> None:
    say("", title, *(f"  {line}" for line in lines))


def say(*lines: str) -> None:
    print("\n".join(lines), flush=True)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench BENCH_ARGS=…", description=__doc__)
    parser.add_argument("--runs", type=int, default=200, metavar="N", help="starts of each case (200)")
    parser.add_argument("--match", default="", metavar="TEXT", help="only starts with TEXT in their name, and the bare one")
    parser.add_argument("--mounts", type=int, default=1000, metavar="N", help="additional mounts (1000)")
    parser.add_argument("--containers", type=int, default=30, metavar="N", help="containers of each kind (30)")
    parser.add_argument("--kills", type=int, default=5, metavar="N", help="trees of each kind (5)")
    parser.add_argument("--trees", type=int, default=3, metavar="N", help="rounds of large trees (3)")
    parser.add_argument("--flows", type=int, default=7, metavar="N", help="rounds of the bytes through stdio (7)")
    parser.add_argument("--realtime", action="store_true", help="measure before everything else that runs here (root), on a machine that is not idle")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="only these parts")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

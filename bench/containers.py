"""What a container costs by way of nodewrap beside Apptainer called directly: both start the same image with the same options.

Apptainer's own start takes 60 ms, and differs from one to the next, and from minute to minute, by more than what is looked for. So what is
compared was started in one round, within half a second; of the rounds' differences the median counts, and between which bounds it lies. In each
round every case comes twice, the second time in reverse order: whoever comes behind a container finds other caches than who comes behind a bare
exec.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from bench import measure
from bench.cases import Case, bare, declared, nodewrap
from bench.node import CONTAINED, Node, apptainer
from tests import container

#: Milliseconds beyond Apptainer's own start and nodewrap's own.
BACKEND = 5.0


class Cost(NamedTuple):
    """ms, medians: contained (all of it), direct (Apptainer alone), own (nodewrap without a container, over a bare exec). rounds: ms of the backend's
    own in each round.
    """

    launcher: str
    contained: float
    direct: float
    own: float
    rounds: tuple[float, ...]

    @property
    def backend(self) -> float:
        return statistics.median(self.rounds)

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which the median lies, with 95 %, whatever the distribution: two of the sorted rounds, by the binomial's normal approximation."""
        inner = max(0, math.floor(len(self.rounds) / 2 - 0.98 * math.sqrt(len(self.rounds))))
        return sorted(self.rounds)[inner], sorted(self.rounds)[-1 - inner]


def costs(node: Node, runs: int) -> list[Cost]:
    """With the policy child resident; runs: rounds."""
    image = container.tree(node.session.top / "image")
    words = ("--quiet", "--nocolor", "exec", "--contain", "--home", "/tmp", "--pwd", "/tmp", "--bind", "/tmp", "--bind", "/var/tmp")
    cases = [bare(), Case("apptainer exec", (str(apptainer()), *words, str(image), "/bin/true"))]
    ask = declared(CONTAINED)
    for place in node.places.values():
        for name, more in (("", ()), ("image", ("--image", str(image)))):
            cases.append(nodewrap(place, name, (*ask, *more), True, place.memory is not None))
    times = measure.starts(node, [*cases, *reversed(cases)], runs)
    assert not any(one.failed for one in times), [(one.case.name, one.failed) for one in times]
    bare_ms, direct, *pairs = [_both(there.rounds, back.rounds) for there, back in zip(times[:len(cases)], reversed(times))]
    return [_cost(launcher, pairs[at + 1], direct, pairs[at], bare_ms) for at, launcher in zip(range(0, len(pairs), 2), node.places)]


def _both(there: tuple[float, ...], back: tuple[float, ...]) -> list[float]:
    """ms of a case in each round, from its two starts there in µs."""
    return [(one + other) / 2000 for one, other in zip(there, back)]


def _cost(launcher: str, contained: list[float], direct: list[float], plain: list[float], bare_ms: list[float]) -> Cost:
    own = [all_ - exec_ for all_, exec_ in zip(plain, bare_ms)]
    rounds = tuple(all_ - runtime - ours for all_, runtime, ours in zip(contained, direct, own))
    return Cost(launcher, statistics.median(contained), statistics.median(direct), statistics.median(own), rounds)

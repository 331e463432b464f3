"""What a container costs by way of nodewrap beside Apptainer called directly: both start the same image with the same options."""

from __future__ import annotations

from typing import NamedTuple

from bench import measure
from bench.cases import Case, bare, declared, nodewrap
from bench.node import CONTAINED, Node, apptainer
from tests import container

#: Milliseconds beyond Apptainer's own start and nodewrap's own.
BACKEND = 5.0


class Cost(NamedTuple):
    """ms, medians: contained (all of it), direct (Apptainer alone), own (nodewrap without a container, over a bare exec)."""

    launcher: str
    contained: float
    direct: float
    own: float

    @property
    def backend(self) -> float:
        return self.contained - self.direct - self.own


def costs(node: Node, runs: int) -> list[Cost]:
    """Measured round robin, with the policy child resident."""
    image = container.tree(node.session.top / "image")
    words = ("--quiet", "--nocolor", "exec", "--contain", "--home", "/tmp", "--pwd", "/tmp", "--bind", "/tmp", "--bind", "/var/tmp")
    cases = [bare(), Case("apptainer exec", (str(apptainer()), *words, str(image), "/bin/true"))]
    ask = declared(CONTAINED)
    for place in node.places.values():
        for name, more in (("", ()), ("image", ("--image", str(image)))):
            cases.append(nodewrap(place, name, (*ask, *more), True, place.memory is not None))
    times = measure.starts(node, cases, runs)
    assert not any(one.failed for one in times), [(one.case.name, one.failed) for one in times]
    exec_ms, direct, *pairs = [one.at(0.5) for one in times]
    return [Cost(launcher, pairs[at + 1], direct, pairs[at] - exec_ms) for at, launcher in zip(range(0, len(pairs), 2), node.places)]

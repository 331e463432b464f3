"""The measuring harness measures what it says: real starts, failures counted apart, promises judged by the numbers shown."""

from __future__ import annotations

import subprocess

import pytest

from bench import table
from bench.cases import Case
from bench.containers import Cost, _cost
from bench.measure import Kill, Memory, Times
from bench.node import compiled
from bench.relay import SIZE, Flow, Idle
from tests.need import need


@pytest.fixture(scope="module")
def timer():
    """timer(lines, runs): {name: (failed, busy, [us])}."""
    need("gcc")
    program = compiled("timer")

    def run(lines, runs=3):
        done = subprocess.run([program, str(runs), "1"], input=lines, capture_output=True, text=True, check=True)
        rows = [line.split("\t") for line in done.stdout.splitlines()]
        return {name: (int(failed), int(busy), [float(one) for one in us]) for name, failed, busy, *us in rows}

    return run


def test_timer_shows_how_long_a_command_ran(timer):
    found = timer("case slow\narg sleep\narg 0.5\ncase fast\narg true\n")
    assert [len(us) for _, _, us in found.values()] == [3, 3]
    assert min(found["slow"][2]) >= 500000 > min(found["fast"][2])


def test_timer_counts_failures_apart(timer):
    found = timer("case bad\narg false\ncase missing\narg /nonexistent/command\ncase good\narg true\n")
    assert [(failed, len(us)) for failed, _, us in found.values()] == [(3, 0), (3, 0), (0, 3)]


def test_timer_gives_a_case_its_words_environment_link_and_descriptor(timer, tmp_path):
    (tmp_path / "text").write_text("x\n")
    lines = [f"link {tmp_path}/link text", f"fd9 {tmp_path}/text", "env KEY=a b", "arg sh", "arg -c"]
    script = f'test "$KEY" = "a b" && test "$(cat {tmp_path}/link)" = x && read word <&9 && test "$word" = x'
    found = timer("\n".join(["case all", *lines, f"arg {script}"]) + "\n")
    assert found["all"][0] == 0


def test_tree_leaves_as_many_processes_as_asked():
    need("gcc")
    argv = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child", compiled("tree"), "idle", "40"]
    need("userns")
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout.split()[0]) == 40


@pytest.mark.parametrize(("ours", "word"), [(3900.0, "kept"), (4100.0, "MISSED")])
def test_promise_is_judged_by_the_difference_of_medians(ours, word):
    times = [Times(Case("bare", ()), [1000.0] * 3, 0, 0), Times(Case("ours", (), (), 3.0), [ours - 1, ours, 9000.0], 0, 1)]
    lines = table.of_starts(times)
    assert lines[2].split()[-1] == word
    assert f"{(ours - 1000) / 1000:+.2f}" in lines[2]


def test_failed_starts_are_shown():
    lines = table.of_starts([Times(Case("bare", ()), [1000.0], 0, 0), Times(Case("ours", (), (), 3.0), [], 7, 0)])
    assert "(7 FAILED)" in lines[2]
    assert lines[2].endswith("MISSED")


def test_kill_that_leaves_processes_or_takes_long_is_not_kept():
    assert table.of_kills([Kill("x", 5000, 0.4, 0)])[1].endswith("kept")
    assert table.of_kills([Kill("x", 5000, 0.6, 0)])[1].endswith("MISSED")
    assert table.of_kills([Kill("x", 5000, 0.4, 1)])[1].endswith("MISSED")


def test_memory_is_judged_together():
    lines = table.of_memory([Memory("setuid", "launcher", 4000, 2000), Memory("setuid", "init", 3000, 1500)])
    assert lines[-1].split()[2:4] == ["7000", "3500"]
    assert lines[-1].endswith("MISSED")


def test_containers_are_judged_by_what_neither_apptainer_nor_the_launcher_takes():
    made = [Cost("a", 70.0, 60.0, 4.9, (5.1,) * 30), Cost("b", 70.0, 60.0, 5.1, (4.9,) * 30), Cost("c", 70.0, 60.0, 5.0, (4.0, 6.1) * 15)]
    lines = table.of_containers(made)
    assert [line.split()[-1] for line in lines[1:]] == ["MISSED", "kept", "unsettled"]


def test_containers_are_compared_within_a_round_whatever_the_rounds_among_themselves():
    """Two of 30 rounds in which something else ran do not count, nor does a machine that gets slower from round to round."""
    drift = [float(at * at) for at in range(30)]
    disturbed = [40.0 if at in (3, 17) else 3.0 for at in range(30)]
    cost = _cost("setuid", [60 + all_ + more + 4 for all_, more in zip(drift, disturbed)], [60 + all_ for all_ in drift], [5.0] * 30, [1.0] * 30)
    assert cost.backend == pytest.approx(3.0)
    assert cost.bounds == (pytest.approx(3.0), pytest.approx(3.0))


def test_bytes_through_stdio_are_judged_by_the_median_and_only_where_they_are_carried():
    lines = table.of_flows([Flow("a", [SIZE / 1.9e9, SIZE / 1.9e9, SIZE / 9e9], True), Flow("b", [SIZE / 2.1e9] * 3, True), Flow("c", [9.0], False)])
    assert [line.split()[-1] for line in lines[1:]] == ["MISSED", "kept", lines[3].split()[-1]]
    assert lines[1].split()[1:3] == ["1.90", "9.00"]
    assert "kept" not in lines[3]
    assert "MISSED" not in lines[3]


def test_idle_time_is_judged_by_its_share():
    assert [line.split()[-1] for line in table.of_idle([Idle("a", 2.9), Idle("b", 3.1)])[1:]] == ["kept", "MISSED"]

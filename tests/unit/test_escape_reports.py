"""Reports of the escape suite: whole, escaped, readable by strict parsers and by a real browser."""

from __future__ import annotations

import json
import os
import re
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from nodewrap.escape.model import Outcome, Result, attacks
from nodewrap.escape.report import FORMATS
from nodewrap.escape.report.terminal import table
from tests.need import need

attacks()
HOSTILE = "\x1b[2J</section><script>document.title='owned'</script>\"'&\udcff\x00\ufffe"
RESULTS = [
    Result("C01", "setuid/switch/strict", Outcome.BLOCKED, "it writes no more", "the daemon still writes", seconds=0.12),
    Result("C01", "setuid/log-only/none", Outcome.LEAKED, HOSTILE, HOSTILE),
    Result("C13", "setuid/switch/strict", Outcome.DIRTY, "stopped", "read", [f"file: /tmp/{HOSTILE}"]),
    Result("C13", "setuid/log-only/none", Outcome.LEAKED, "(the nonce)", "(the nonce)", accepted="same-id-none"),
    Result("F24", "-", Outcome.NOT_EXERCISED, "needs another kernel"),
    Result("C17", "setuid/switch/strict", Outcome.NOT_EXERCISED, "its control did not succeed: x"),
    Result("C17", "setuid/log-only/none", Outcome.BROKEN, "broken: ValueError"),
]


class Strict(HTMLParser):
    """{id of a section: its text}, cells: [(class, link, text)]; elements that are open at the end are an error."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.sections, self.cells, self.scripts = [], {}, [], 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))
        self.scripts += tag == "script"
        if tag == "section":
            self.sections[dict(attrs)["id"]] = ""
        if tag == "a" and self.open[-2][0] == "td":
            self.cells.append([self.open[-2][1]["class"], dict(attrs)["href"], ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for tag, attrs in self.open:
            if tag == "section":
                self.sections[attrs["id"]] += data
        if [tag for tag, _ in self.open[-2:]] == ["td", "a"]:
            self.cells[-1][2] += data


def test_html_cells_open_their_evidence_and_tell_open_from_accepted():
    page = Strict(FORMATS["html"](RESULTS))
    assert [(style.split(), text) for style, _, text in page.cells] == [
        (["blocked"], "✓"), (["leaked"], "LEAK"), (["dirty"], "DIRT"), (["leaked", "accepted"], "open"), (["none"], "–"), (["broken"], "?"),
    ]
    assert {link.removeprefix("#") for _, link, _ in page.cells} == page.sections.keys()
    assert "it writes no more" in page.sections["C01-setuid-switch-strict"]
    assert "end of the pid namespace" in page.sections["C01-setuid-switch-strict"]


def test_html_shows_what_hostile_code_said_and_runs_none_of_it():
    text = FORMATS["html"](RESULTS)
    page = Strict(text)
    assert page.scripts == 1
    assert "document.title='owned'" in page.sections["C01-setuid-log-only-none"]
    assert "default-src 'none'" in text
    assert not re.search(r"https?://", text)
    text.encode("utf-8")


def test_json_holds_every_result_with_its_catalogue_row():
    found = json.loads(FORMATS["json"](RESULTS))["results"]
    assert [(one["attack"], one["outcome"], one["failure"]) for one in found] == [(one.attack, one.outcome.value, one.is_failure) for one in RESULTS]
    assert found[0]["tries"] == "double fork + setsid daemon"


def test_junit_is_xml_and_counts_what_is_open_and_what_was_not_tried():
    suites = ET.fromstring(FORMATS["junit"](RESULTS))
    counts = {suite.get("name"): (suite.get("tests"), suite.get("failures"), suite.get("skipped")) for suite in suites}
    assert counts == {"setuid/switch/strict": ("3", "1", "1"), "setuid/log-only/none": ("3", "2", "0"), "-": ("1", "0", "1")}
    assert len(suites.findall(".//failure")) == 3


def test_terminal_table_escapes_names_all_that_is_open_and_why_something_was_not_tried():
    text = table(RESULTS)
    assert "\x1b" not in text
    assert "3 OPEN OR BROKEN" in text
    assert "F24  needs another kernel" in text
    assert "same-id-none" not in text.partition("C processes")[2].partition("Not exercised")[0]


@pytest.fixture
def browser(tmp_path):
    """DOM after its scripts ran: a real browser without a window, and without its own sandbox, as root."""
    need("chromium")

    def dump(page, fragment=""):
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", f"--user-data-dir={tmp_path}/profile"]
        argv = ["chromium", *quiet, "--dump-dom"]
        env = {**os.environ, "HOME": str(tmp_path)}
        done = subprocess.run([*argv, f"file://{tmp_path}/page.html{fragment}"], capture_output=True, text=True, timeout=120, env=env, check=True)
        return done.stdout

    return dump


def test_browser_shows_the_page_filters_it_and_opens_evidence(browser):
    """The page's policy allows its own script alone, so the test drives it by a copy of the page whose policy is taken out."""
    page = FORMATS["html"](RESULTS)
    seen = browser(page)
    assert "<title>nodewrap escape-test: 3 open or broken</title>" in seen
    drive = (
        "<script>const t=document.getElementById('text');t.value='zzz';t.dispatchEvent(new Event('input'));"
        "const hidden=document.querySelectorAll('tr.attack[hidden]').length;t.value='';document.getElementById('open').checked=true;"
        "t.dispatchEvent(new Event('input'));const left=document.querySelectorAll('tr.attack:not([hidden])').length;"
        "location.hash='#C01-setuid-switch-strict';const shown=getComputedStyle(document.getElementById('C01-setuid-switch-strict')).display;"
        "document.body.dataset.said=[hidden,left,shown].join(' ')</script></body>"
    )
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</body>", drive)
    assert 'data-said="4 3 block"' in browser(free)


def test_browser_obeys_the_policy_of_the_page(browser):
    """A script that came by what hostile code said would not run, even if it were not escaped."""
    page = FORMATS["html"](RESULTS).replace("</body>", "<script>document.title='owned'</script></body>")
    assert "<title>owned</title>" not in browser(page)

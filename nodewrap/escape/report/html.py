"""One page that needs nothing else: a matrix of attacks and configurations, each cell opening what was tried, seen, and what stopped it.

No script is needed to read it: a cell is a link to its evidence, which CSS shows while it is the target. The script only filters rows. Whatever
hostile code said stands in the page escaped, and the page's own policy forbids everything but its own style and script (Content-Security-Policy).
"""

from __future__ import annotations

import base64
import hashlib
import html
import platform
from datetime import datetime, timezone

from nodewrap import __version__
from nodewrap.escape.model import REGISTRY, SURFACES, Outcome, Result, catalogue

#: What a cell shows: a sign that survives printing without colours, and a class.
SIGNS = {
    Outcome.BLOCKED: ("✓", "blocked"), Outcome.LEAKED: ("LEAK", "leaked"), Outcome.DIRTY: ("DIRT", "dirty"), Outcome.NOT_EXERCISED: ("–", "none"),
    Outcome.BROKEN: ("?", "broken"),
}
STYLE = """
body{font:15px/1.4 system-ui,sans-serif;margin:1.5em;color:#111;background:#fff}
h1{font-size:1.5em;margin:0}p{margin:.4em 0}
table{border-collapse:collapse;margin-top:1em}
th,td{border:1px solid #999;padding:.15em .45em;text-align:center;vertical-align:top}
th.row,td.row{text-align:left;font-weight:normal;max-width:34em}
thead th{position:sticky;top:0;background:#eee;z-index:1}
thead th span{writing-mode:vertical-rl;white-space:nowrap}
tr.surface th{text-align:left;background:#ddd}
td a{color:inherit;text-decoration:none;display:block;min-width:1.6em}td a:focus,td a:hover{outline:2px solid #000}
.blocked{background:#cfe8cf}.leaked{background:#d33;color:#fff;font-weight:bold}.dirty{background:#e8a33d;font-weight:bold}
.accepted{background:repeating-linear-gradient(45deg,#fff3c4,#fff3c4 5px,#ead98f 5px,#ead98f 10px);color:#000;font-weight:normal}
.none{background:#f3f3f3;color:#666}.broken{background:#b9a3e0;font-weight:bold}
section{display:none}
section:target{display:block;position:fixed;right:1em;bottom:1em;width:min(46em,90vw);max-height:80vh;overflow:auto;background:#fff;
border:2px solid #000;padding:1em;z-index:2;box-shadow:0 0 2em #0006}
dt{font-weight:bold;margin-top:.5em}dd{margin:0;overflow-wrap:anywhere;white-space:pre-wrap}
label{margin-right:1em}
[hidden]{display:none}
@media print{*{print-color-adjust:exact;-webkit-print-color-adjust:exact}.filter{display:none}thead th{position:static}section:target{display:none}}
"""
SCRIPT = """
const text=document.getElementById('text'),open_=document.getElementById('open');
function show(){
  const word=text.value.toLowerCase();
  for(const row of document.querySelectorAll('tr.attack'))
    row.hidden=!(row.textContent.toLowerCase().includes(word)&&(!open_.checked||row.dataset.open==='1'));
  for(const head of document.querySelectorAll('tr.surface'))
    head.hidden=!document.querySelector('tr.attack[data-surface="'+head.dataset.surface+'"]:not([hidden])');
}
text.addEventListener('input',show);open_.addEventListener('change',show);
document.addEventListener('keydown',e=>{if(e.key==='Escape')location.hash='#none'});
"""


def as_html(results: list[Result]) -> str:
    """The page. Cells of attacks that were not tried in a configuration are empty."""
    names = [name for name in dict.fromkeys(one.configuration for one in results) if name != "-"]
    cells = {(one.attack, one.configuration): one for one in results}
    rows, evidence = [], []
    for letter, title in SURFACES.items():
        mine = [key for key in catalogue() if key[0] == letter and any(one.attack == key for one in results)]
        if not mine:
            continue
        rows.append(f'<tr class="surface" data-surface="{letter}"><th colspan="{len(names) + 2}">{letter} {html.escape(title)}</th></tr>')
        for key in mine:
            found = [cells.get((key, name)) for name in names]
            rows.append(_row(key, found, cells.get((key, "-"))))
            evidence += [_evidence(one) for one in found if one]
    return _page(results, names, rows, evidence)


def _row(key: str, found: list[Result | None], left_out: Result | None) -> str:
    is_open = any(one and one.outcome in (Outcome.LEAKED, Outcome.DIRTY, Outcome.BROKEN) for one in found)
    tries = html.escape(catalogue()[key].tries)
    line = f'<tr class="attack" data-surface="{key[0]}" data-open="{int(is_open)}"><td>{key}</td><td class="row">{tries}</td>'
    if left_out:
        return line + f'<td class="row none" colspan="{len(found) or 1}">not played: {html.escape(left_out.seen)}</td></tr>'
    return line + "".join(_cell(one) for one in found) + "</tr>"


def _cell(one: Result | None) -> str:
    if one is None:
        return "<td></td>"
    sign, style = SIGNS[one.outcome]
    accepted = one.accepted and one.outcome in (Outcome.LEAKED, Outcome.DIRTY)
    return f'<td class="{style}{" accepted" if accepted else ""}"><a href="#{_anchor(one)}">{"open" if accepted else sign}</a></td>'


def _anchor(one: Result) -> str:
    return f"{one.attack}-{one.configuration.replace('/', '-').replace(' ', '-')}"


def _evidence(one: Result) -> str:
    attack = REGISTRY.get(one.attack)
    facts = {
        "outcome": one.outcome.value + (f", a documented risk: {one.accepted}" if one.accepted and one.outcome is not Outcome.BLOCKED else ""),
        "how it is tried": (attack.run.__doc__ or "").strip() if attack else "", "what shall stop it": attack.stopped_by if attack else "",
        "seen, from outside": one.seen, "without protection": one.control, "left behind": "\n".join(one.litter) or "nothing",
        "replays": catalogue()[one.attack].replays, "took": f"{one.seconds:.2f} s",
    }
    said = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items() if text)
    title = html.escape(f"{one.attack} in {one.configuration}")
    return f'<section id="{html.escape(_anchor(one))}"><a href="#none">close</a><h2>{title}</h2><dl>{said}</dl></section>'


def _page(results: list[Result], names: list[str], rows: list[str], evidence: list[str]) -> str:
    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    policy = f"default-src 'none'; style-src 'sha256-{digest(STYLE)}'; script-src 'sha256-{digest(SCRIPT)}'; base-uri 'none'; form-action 'none'"
    failed, tried = sum(one.is_failure for one in results), sum(one.configuration != "-" for one in results)
    verdict = f"{failed} open or broken" if failed else "nothing is open that is not documented"
    where = html.escape(f"nodewrap {__version__}, {platform.system()} {platform.release()} {platform.machine()}")
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    legend = "✓ stopped · LEAK reached its aim · open: a documented risk · DIRT stopped, something was left · – not to be tried · ? the suite failed"
    heads = "".join(f"<th><span>{html.escape(name)}</span></th>" for name in names)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width"><title>nodewrap escape-test: {verdict}</title><style>{STYLE}</style></head>
<body id="none"><h1>nodewrap escape-test: {verdict}</h1>
<p>{len({one.attack for one in results})} attacks, {tried} tries; {where}; {when}</p><p>{legend}</p>
<p class="filter"><label>Filter <input id="text" type="search"></label><label><input id="open" type="checkbox"> only what is open</label></p>
<table><thead><tr><th>id</th><th class="row">tries</th>{heads}</tr></thead><tbody>
{chr(10).join(rows)}
</tbody></table>
{chr(10).join(evidence)}
<script>{SCRIPT}</script></body></html>
"""

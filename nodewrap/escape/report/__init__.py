"""What the suite found, for people and for machines: {format: function of the results that returns its text}."""

from __future__ import annotations

from collections.abc import Callable

from nodewrap.escape.model import Result
from nodewrap.escape.report.documents import as_json, as_junit
from nodewrap.escape.report.html import as_html

FORMATS: dict[str, Callable[[list[Result]], str]] = {"html": as_html, "json": as_json, "junit": as_junit}

"""The line as docs/audit.md defines it."""

from __future__ import annotations

import base64
import hashlib
import json

import pytest

from nodewrap import digest
from nodewrap.audit import record


def test_objects_open_and_close_as_the_path_changes():
    fields = [("event.sequence", 7), ("event.ok", True), ("@timestamp", "t"), ("a.b.c", 1), ("a.b.d", ["x", "y"]), ("a.e", -1)]
    fields += [("f", False), ("g.h.i.j", []), ("g.k", "")]
    assert record.render(fields) == (
        b'{"event":{"sequence":7,"ok":true},"@timestamp":"t","a":{"b":{"c":1,"d":["x","y"]},"e":-1},"f":false,"g":{"h":{"i":{"j":[]}},"k":""}}\n'
    )
    assert record.render([]) == b"{}\n"


def test_characters_that_terminals_and_readers_obey_are_escaped():
    text = '"\\\n\t\x1b\x7f\u0080\u009f\u2028\u202e\u2066\u2069\xad\u061c\u200b\u200f\u2060\ufeff/é😀'
    wanted = r'"\"\\\u000a\u0009\u001b\u007f\u0080\u009f\u2028\u202e\u2066\u2069\u00ad\u061c\u200b\u200f\u2060\ufeff/é😀"'
    assert record.render([("a", text)]).decode() == '{"a":' + wanted + "}\n"


@pytest.mark.parametrize(("raw", "shown"), [
    (b"a\xffb", "a\ufffdb"), (b"\xc0\xaf", "\ufffd" * 2), (b"\xed\xa0\x80", "\ufffd" * 3), (b"\xe2\x82", "\ufffd" * 2),
    (b"\xe2\x82A", "\ufffd" * 2 + "A"), (b"\xf4\x90\x80\x80", "\ufffd" * 4), (b"\xf0\x80\x80\xaf", "\ufffd" * 4), (b"\x80", "\ufffd"),
])
def test_bytes_that_are_no_utf8_become_one_mark_each_and_stand_again_in_base64(raw, shown):
    made = json.loads(record.render([("x.a", raw), ("x.b", [b"fine", raw])]))["x"]
    assert made["a"] == shown
    assert base64.b64decode(made["a_b64"]) == raw
    assert made["b"] == ["fine", shown]
    assert [base64.b64decode(item) for item in made["b_b64"]] == [b"fine", raw]


def test_surrogate_escapes_stand_for_their_bytes():
    assert record.render([("a", "x\udcff")]) == record.render([("a", b"x\xff")])


def test_long_argument_list_is_cut_and_says_so():
    args = ["sh", "-c", "x" * 9000, "tail"]
    whole = digest.args_sha256([arg.encode() for arg in args])
    line = record.render([("event.sequence", 1), ("process.args", args), ("process.args_sha256", whole), ("z", "end")])
    made = json.loads(line)
    assert len(line) <= record.RECORD_MAX
    assert made["process"]["args"][:2] == ["sh", "-c"]
    assert made["process"]["args"][2] == "x" * (2048 - len('"sh","-c",""'))
    assert made["process"]["args_cut"] == 4
    assert made["process"]["args_sha256"] == hashlib.sha256(b"sh\0-c\0" + b"x" * 9000 + b"\0tail\0").hexdigest()
    assert made["z"] == "end"


def test_cut_never_splits_a_character_or_an_escape():
    for pad in range(8):
        made = json.loads(record.render([("process.executable", "x" * pad + "\x1bé" * 3000)]))["process"]
        assert made["executable"] == ("x" * pad + "\x1bé" * 3000)[:len(made["executable"])]
        assert made["executable_cut"] == pad + 9000


def test_base64_twin_of_a_cut_value_holds_what_was_kept():
    made = json.loads(record.render([("process.args", [b"\xff" * 5000]), ("process.pid", 1)]))["process"]
    assert base64.b64decode(made["args_b64"][0]) == b"\xff" * len(made["args"][0])
    assert made["args_cut"] == 1


def test_claims_cannot_push_out_what_the_site_found():
    dn = "/DC=org/CN=" + "n" * 480
    claims = [(f"nodewrap.declared.c{i}", "x" * 2000) for i in range(12)]
    made = json.loads(record.render([("nodewrap.subject.dn", dn), *claims, ("process.args", ["y" * 9000])]))
    assert made["nodewrap"]["subject"]["dn"] == dn
    assert made["nodewrap"]["declared"]["c0_cut"] == 2000


def test_line_that_cannot_be_made_to_fit_is_an_error():
    with pytest.raises(ValueError, match="more than 4096"):
        record.render([(f"site.n{i}", "x" * 600) for i in range(12)])


@pytest.mark.parametrize("fields", [
    [("a", 1), ("a", 2)], [("a.b", 1), ("c", 1), ("a.d", 1)], [("a", 1), ("a.b", 1)], [("a.b", 1), ("a", 1)], [("", 1)], [("a..b", 1)], [("a b", 1)],
    [("a\n", 1)], [("a", 2**63)], [("a", None)], [("a", 1.5)], [("a", "x\0y")], [("a", ["\0"])], [("a_b64", "x"), ("a", b"\xff")],
])
def test_fields_that_would_make_an_ambiguous_record_are_refused(fields):
    with pytest.raises(ValueError, match=r"field|NUL"):
        record.render(fields)

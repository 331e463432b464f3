"""Distinguished names: one line, one meaning (attacks B02, B05, B06)."""

from __future__ import annotations

import itertools

import pytest
from asn1crypto import core

from nodewrap.credentials.errors import deny
from nodewrap.credentials.names import read_name, same_text
from nodewrap.model import Refusal
from tests.pki import tlv

CN, O, OU = "2.5.4.3", "2.5.4.10", "2.5.4.11"  # noqa: E741
UTF8, PRINTABLE, T61, IA5, VISIBLE, UNIVERSAL, BMP = 12, 19, 20, 22, 26, 28, 30


def rdn(*attributes):
    return tlv(0x31, *[tlv(0x30, core.ObjectIdentifier(oid).dump(), tlv(tag, value)) for oid, tag, value in attributes])


def name(*rdns):
    return read_name(tlv(0x30, *rdns))


def code(*rdns):
    with pytest.raises(Refusal) as caught:
        name(*rdns)
    assert caught.value.exit == 203
    assert caught.value.text.isprintable()
    assert caught.value.text.isascii()
    return caught.value.code


def test_one_line_form_escapes_as_openssl_does():
    assert name(rdn((O, UTF8, b"x")), rdn((CN, UTF8, "Thrée".encode()))).oneline == "/O=x/CN=Thr\\xC3\\xA9e"
    assert name(rdn((CN, T61, "Thrée".encode("latin-1")))).oneline == "/CN=Thr\\xE9e"


def test_multi_valued_rdn_is_joined_by_plus():
    assert name(rdn((O, UTF8, b"a"), (OU, UTF8, b"b")), rdn((CN, UTF8, b"x"))).oneline == "/O=a+OU=b/CN=x"


@pytest.mark.parametrize("value", [b"a/CN=b", b"a/O=b", b"a/ CN = b", b"a/1.2.3=b", b"a+CN=b", b"/CN=", b"a/emailAddress=x@y"])
def test_value_that_looks_like_the_next_attribute_is_refused(value):
    assert code(rdn((CN, UTF8, value))) == "NW-X509-DN"


@pytest.mark.parametrize("value", [b"host/wn1.example.org", b"a=b", b"C++ developer", b"a/b", b"Robot: x - y", b"x@y", b"a/b c/d"])
def test_slash_and_equals_in_a_value_are_fine_where_they_deceive_nobody(value):
    assert name(rdn((CN, UTF8, value))).oneline == f"/CN={value.decode()}"


@pytest.mark.parametrize("value", [b"Thr\\xC3\\xA9e", b"a\\/b", b"a\\", b"\\+"])
def test_backslash_is_refused_because_openssl_escapes_with_it_but_not_it(value):
    assert code(rdn((CN, UTF8, value))) == "NW-X509-DN"


@pytest.mark.parametrize("value", [b"", b"a\0b", b"Alice\0", b"a\nb", b"a\x7fb", b"\x01", b"a\tb", b" ", b" a", b"a "])
def test_empty_value_outer_blank_or_control_byte_is_refused(value):
    assert code(rdn((CN, UTF8, value))) == "NW-X509-DN"


@pytest.mark.parametrize(("tag", "value"), [
    (BMP, "Alice".encode("utf-16-be")), (BMP, "中文".encode("utf-16-be")), (UNIVERSAL, "A".encode("utf-32-be")), (VISIBLE, b"Alice"), (4, b"Alice"),
])
def test_string_types_without_a_plain_one_line_form_are_refused(tag, value):
    with pytest.raises(Refusal, match=f"string type {tag}") as caught:
        name(rdn((CN, tag, value)))
    assert caught.value.code == "NW-X509-DN"


@pytest.mark.parametrize(("tag", "value"), [(UTF8, b"\xff\xfe"), (UTF8, b"\xc0\xaf"), (PRINTABLE, b"\xe9"), (IA5, b"\xe9")])
def test_value_that_is_not_of_its_type_is_refused(tag, value):
    assert code(rdn((CN, tag, value))) == "NW-X509-DN"


def test_attribute_type_without_an_agreed_short_name_is_refused():
    assert code(rdn(("1.2.3.4", UTF8, b"x"))) == "NW-X509-DN"


def test_constructed_string_is_refused():
    assert code(tlv(0x31, tlv(0x30, core.ObjectIdentifier(CN).dump(), tlv(0x2C, tlv(0x0C, b"Alice"))))) == "NW-X509-PARSE"


@pytest.mark.parametrize("junk", [b"", b"\x30", b"\x30\x01", b"\x30\x80\x00\x00", b"\x31\x00", b"\x30\x02\x05\x00", tlv(0x30, rdn()) + b"x"])
def test_bytes_that_are_no_name_are_refused(junk):
    with pytest.raises(Refusal) as caught:
        read_name(junk)
    assert caught.value.code == "NW-X509-PARSE"


def test_equal_text_means_equal_name():
    """All names of up to two RDNs from values made to collide: when the one-line forms agree, so do attributes and bytes."""
    values = [b"a", b"a/CN=b", b"b", b"a+OU=b", b"\\xC3", "Ã".encode("latin-1"), b"a/OU=b"]
    single = [rdn((oid, UTF8, value)) for oid in (CN, OU) for value in values]
    double = [rdn((CN, UTF8, left), (OU, UTF8, right)) for left in values for right in values]
    seen: dict[str, tuple] = {}
    refused = 0
    for rdns in itertools.chain(((one,) for one in single + double), itertools.product(single, repeat=2)):
        try:
            oneline = name(*rdns).oneline
        except Refusal:
            refused += 1
            continue
        assert seen.setdefault(oneline, rdns) == rdns
    assert refused > 100
    assert len(seen) >= 20


@pytest.mark.parametrize("other", ["Alıce", "Alice\u200b", "Аlice", "Alice\u202e", "Ａlice"])
def test_look_alike_is_another_name_and_printable(other):
    made = name(rdn((CN, UTF8, other.encode())))
    assert made.oneline != "/CN=Alice"
    assert made.oneline.isascii()
    assert made.rdns != name(rdn((CN, UTF8, b"Alice"))).rdns


def test_composed_and_decomposed_are_two_names():
    assert name(rdn((CN, UTF8, "é".encode()))).oneline != name(rdn((CN, UTF8, "e\u0301".encode()))).oneline


def test_names_compare_as_openssl_compares_them():
    """X509_NAME_cmp: string type, letter case and blanks do not count; order and types of attributes do."""
    same = [name(rdn((CN, tag, value))) for tag, value in ((UTF8, b"Alice T"), (PRINTABLE, b"Alice T"), (UTF8, b"ALICE  t"), (IA5, b"alice T"))]
    assert len({one.rdns for one in same}) == 1
    assert name(rdn((O, UTF8, b"a")), rdn((CN, UTF8, b"b"))).rdns != name(rdn((CN, UTF8, b"b")), rdn((O, UTF8, b"a"))).rdns


@pytest.mark.parametrize(("left", "right"), [
    ("/O=x/Email=a@b", "/O=x/emailAddress=a@b"), ("/E=a@b/CN=x", "/emailAddress=a@b/CN=x"), ("/USERID=x", "/UID=x"), ("/CN=a\\/b\\+c", "/CN=a/b+c"),
])
def test_old_spellings_in_site_files_mean_the_same(left, right):
    assert same_text(left, right)
    assert not same_text(left, right + "x")


def test_error_text_is_one_printable_line_whatever_the_name_holds():
    from nodewrap.credentials.errors import show

    text = deny("NW-X", show("a\nb\x1b[31m\u202e" + "x" * 1000)).text
    assert text.isprintable()
    assert text.isascii()
    assert len(text) <= 200

"""The line numbers of TOML keys, against documents in which each key has its own name and stands on its own line."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nodewrap.policy.positions import positions, toml

SCALARS = st.sampled_from([
    "1", "-1.5e3", "true", "1979-05-27", "1979-05-27 07:32:00Z", '""', "''", '"a#b"', '"]}"', '"\\""', '"\\\\"', "'\\'", "'\"'", "'[['", '"= x"',
    '"""a"""', '"""\n[x]\nk = 1\n"""', "'''\n# no comment\n'''", '"""a"b""c\\""""', '"""x""""', "'''x'''''", '"""\\\n   joined"""', "inf", "0xff",
])
VALUES = st.recursive(SCALARS, lambda inner: st.one_of(
    st.lists(inner, max_size=3).map(lambda items: "[" + ", ".join(items) + "]"),
    st.lists(inner, max_size=3).map(lambda items: "[\n  # [ ] = \"\n" + "".join(f"  {item}, # x\n" for item in items) + "]"),
    st.lists(inner, max_size=2).map(lambda items: "{ " + ", ".join(f'"i{n} ]" = {item}' for n, item in enumerate(items)) + " }"),
), max_leaves=5)
KEYS = st.sampled_from(["k{}", '"k {}"', "'k.{}'", "a{} . b", 'c{}."d = "'])
HEADERS = st.sampled_from(["[t{}]", "[[l]]", "[ x{} . y ]", "[l.in{}]", '[["q # {}"]]'])
NOISE = st.sampled_from(["", "\n", "# comment [x] = \"\n", "\t\n\r\n"])


def single_line(value):
    """An inline table may not hold a newline (TOML 1.0)."""
    return "\n" not in value or "{ " not in value


@st.composite
def documents(draw):
    """(text, {last part of a key: line})."""
    text, lines = "[[l]]\n", {}
    for number in range(1, 1 + draw(st.integers(0, 8))):
        text += draw(NOISE)
        if draw(st.booleans()):
            text += draw(HEADERS).format(number) + "\n"
        key, value = draw(KEYS).format(number), draw(VALUES.filter(single_line))
        lines[str(number)] = text.count("\n") + 1
        text += f"{key} = {value}{draw(st.sampled_from(['', '  # [c]']))}\n"
    return text, lines


def paths(value, path=()):
    """The path of everything in a parsed document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


@given(document=documents())
def test_every_key_has_the_line_on_which_it_stands(document):
    text, lines = document
    parsed = toml.loads(text)
    found = positions(text, parsed)
    assert set(found) == set(paths(parsed))
    for number, line in lines.items():
        places = {place for path, place in found.items() if str(path[-1]).strip("kac .") == number}
        assert line in places, (number, text)

"""Profiles: what a site may write, what becomes of it, and the file that the launcher reads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodewrap import profiles
from nodewrap.guard import Op, parse_profiles
from nodewrap.policy.positions import toml

SHIPPED = toml.loads((Path(__file__).parents[2] / "policies/profiles.toml").read_text())["profile"]


@pytest.fixture(scope="module")
def merged():
    return profiles.merge(SHIPPED, {})


@pytest.fixture
def node(tmp_path):
    """A file system of a node with a merged /usr, without /lib32, with real character devices."""
    for name in ("usr/bin", "opt", "lib"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "bin").symlink_to("usr/bin")
    (tmp_path / "dev").symlink_to("/dev")
    return tmp_path


def ops(table, node, **more):
    whole = {"namespaces": ["pid", "ipc", "mount"], "system": ["/usr"], "devices": ["null"], **table, **more}
    assert profiles.check("p", whole) == []
    return parse_profiles(profiles.render({"p": whole}, str(node)).encode())["p"].ops


def test_the_shipped_profiles_are_well_formed_and_whole(merged):
    assert [line for name, table in {**SHIPPED, **merged}.items() for line in profiles.check(name, table)] == []
    assert sorted(merged) == ["batch", "compat", "none", "strict"]
    assert [name for name, table in merged.items() if {"add", "like"} & set(table)] == []


def test_the_shipped_profiles_are_ordered_by_strength(merged):
    spaces = {name: set(table["namespaces"]) for name, table in merged.items()}
    assert spaces["strict"] > spaces["batch"] == spaces["compat"] > spaces["none"] == set()
    assert [name for name, table in merged.items() if not table["seccomp"]] == ["none"]
    assert [name for name, table in merged.items() if not table["nested_userns"]] == ["strict"]
    assert [name for name, table in merged.items() if table.get("home")] == ["compat"]


def test_only_profiles_without_a_network_namespace_need_landlock_for_abstract_sockets(merged):
    for name in ("strict", "batch", "compat"):
        assert ("net" in merged[name]["namespaces"]) != ("abstract" in merged[name]["landlock"])


def test_places_where_pilots_keep_their_own_things_are_in_no_profile(merged):
    hidden = ("/home", "/root", "/srv", "/mnt", "/scratch", "/tmp", "/var", "/var/lib", "/run", "/var/run")
    for name, table in merged.items():
        shown = {path.rstrip("?") for key in ("system", "read_only", "writable", "follow", "follow_writable") for path in table.get(key, ())}
        assert shown.isdisjoint(hidden), name


#: Where /etc/resolv.conf may lead, by who keeps it (their own documentation): a name that batch does not show is a payload without name service.
RESOLVERS = {
    "systemd-resolved": "/run/systemd/resolve/stub-resolv.conf", "systemd-resolved, uplink": "/run/systemd/resolve/resolv.conf",
    "NetworkManager": "/run/NetworkManager/resolv.conf", "resolvconf": "/run/resolvconf/resolv.conf", "netconfig": "/run/netconfig/resolv.conf",
    "none": "/etc/resolv.conf",
}


@pytest.mark.parametrize("keeper", RESOLVERS)
def test_the_resolver_file_is_shown_wherever_its_link_leads(merged, keeper):
    for name in ("batch", "compat"):
        shown = [path.rstrip("?") for path in merged[name]["read_only"]]
        assert [path for path in shown if RESOLVERS[keeper] == path or RESOLVERS[keeper].startswith(path + "/")], name
    assert "/etc/resolv.conf?" in merged["strict"]["read_only"]  # what the link leads to: a bind follows it outside


def test_strict_shows_no_private_key_of_the_host(merged):
    shown = {path.rstrip("?") for path in merged["strict"]["read_only"]}
    assert "/etc/grid-security" not in shown
    assert "/etc" not in shown


def test_rendering_is_what_the_launcher_reads_and_keeps_every_setting(merged, node):
    read = parse_profiles(profiles.render(merged, str(node)).encode())
    for name, table in merged.items():
        assert (read[name].namespaces, read[name].degrade) == (tuple(table["namespaces"]), table["on_missing"] == "degrade")
        assert read[name].seccomp == (f"seccomp.{name}.bpf" if table["seccomp"] else "")
        assert sorted(read[name].landlock) == sorted(table["landlock"])
        assert [op.path for op in read[name].ops if op.kind == "tmpfs"] == sorted(table.get("tmpfs", {}))


def test_a_merged_usr_becomes_links_and_absent_directories_nothing(node):
    found = ops({"system": ["/usr", "/bin", "/lib", "/lib32"]}, node)
    assert Op("link", "/bin", "usr/bin") in found
    assert Op("bind", "/usr") in found
    assert Op("bind", "/lib") in found
    assert [op for op in found if op.path == "/lib32"] == []


def test_parents_come_before_what_lies_in_them(node):
    found = ops({"read_only": ["/a/b", "/a-b", "/a", "/etc/ssl?"], "tmpfs": {"/a/b/c": "1MiB", "/tmp": "4KiB"}, "proc": True, "mqueue": True}, node)
    places = ["/dev" if op.kind == "dev" else {"proc": "/proc", "mqueue": "/dev/mqueue"}.get(op.kind, op.path) for op in found]
    for at, place in enumerate(places):
        assert not [later for later in places[at:] if place.startswith(later + "/")], places


def test_modes_and_question_marks_reach_the_launcher(node):
    found = ops({"read_only": ["/a", "/b?"], "writable": ["/c?"], "follow": ["/cvmfs?"], "follow_writable": ["/eos"]}, node)
    assert {Op("bind", "/a"), Op("bind", "/b", optional=True), Op("bind", "/c", writable=True, optional=True), Op("slave", "/cvmfs", optional=True),
            Op("slave", "/eos", writable=True)} <= set(found)


@pytest.mark.parametrize(("size", "number"), [("4096", 4096), ("512MiB", 512 << 20), ("4GiB", 4 << 30), ("1TiB", 1 << 40), ("8KiB", 8192)])
def test_sizes_are_bytes_for_the_launcher(node, size, number):
    assert [op.size for op in ops({"tmpfs": {"/tmp": size}}, node) if op.kind == "tmpfs"] == [number]


def test_devices_are_given_when_the_node_has_them(node, tmp_path):
    assert [op.path for op in ops({"devices": ["null", "no-such-device?"]}, node) if op.kind == "dev"] == ["null"]
    with pytest.raises(profiles.ProfileError, match=r"profile\.p\.devices: this node has no /dev/no-such"):
        ops({"devices": ["no-such"]}, node)
    (node / "dev").unlink()
    (node / "dev").mkdir()
    (node / "dev/disk").touch()
    with pytest.raises(profiles.ProfileError, match="not a character device"):
        ops({"devices": ["disk"]}, node)


def test_patterns_of_devices_reach_the_launcher_which_looks_at_each_run(node):
    wanted = ["nvidia*?", "nvidia-caps/*?", "dri/renderD*?", "kfd?"]
    assert [op.path for op in ops({"devices": ["null", *wanted]}, node) if op.kind == "dev"] == ["null", "nvidia*", "nvidia-caps/*", "dri/renderD*"]
    assert [op.path for op in ops({"devices": ["nul*"]}, node) if op.kind == "dev"] == ["nul*"]
    with pytest.raises(profiles.ProfileError, match="this node has no /dev/nvidia9"):
        ops({"devices": ["nvidia9*"]}, node)


@pytest.mark.parametrize(("table", "said"), [
    ({"namespace": ["pid"]}, "profile.x.namespace: unknown key; did you mean 'namespaces'?"),
    ({"namespaces": ["pids"]}, "profile.x.namespaces: 'pids' is not one of pid, ipc, uts, cgroup, mount, net; did you mean 'pid'?"),
    ({"namespaces": ["pid", "pid"]}, "profile.x.namespaces: 'pid' stands there twice"),
    ({"namespaces": "pid"}, "profile.x.namespaces: 'pid' is not a list"),
    ({"on_missing": "warn"}, "profile.x.on_missing: 'warn' is not one of refuse, degrade"),
    ({"seccomp": False}, "profile.x.seccomp: only the profile 'none' goes without the kernel-surface filter"),
    ({"seccomp": "yes"}, "profile.x.seccomp: 'yes' is not true or false"),
    ({"landlock": ["udp"]}, "profile.x.landlock: 'udp' is not one of abstract, signals, files, tcp"),
    ({"tcp_bind": [70000]}, "profile.x.tcp_bind: 70000 is not a port from 0 to 65535"),
    ({"tcp_connect": ["443"]}, "profile.x.tcp_connect: '443' is not a port from 0 to 65535"),
    ({"tmpfs": {"/tmp": "huge"}}, "profile.x.tmpfs: /tmp: 'huge' is not a size such as '512MiB' or '4GiB', from 4KiB to 1024TiB"),
    ({"tmpfs": {"/tmp": "1"}}, "profile.x.tmpfs: /tmp: '1' is not a size such as '512MiB' or '4GiB', from 4KiB to 1024TiB"),
    ({"tmpfs": {"/tmp?": "4KiB"}}, "profile.x.tmpfs: '/tmp?': a tmpfs is always there, leave the '?' out"),
    ({"add": {"seccomp": True}},
     "profile.x.add: 'seccomp' cannot be added to; lists and tables can: read_only, writable, follow, follow_writable, tmpfs, disk, devices, system, "
     "tcp_bind, tcp_connect"),
    ({"like": "Batch"}, "profile.x.like: 'Batch' is not a profile name (lower-case letters, digits, hyphen, at most 31)"),
    ({"devices": ["a/b/c"]}, "profile.x.devices: 'a/b/c' is not a node of /dev: NAME or DIR/NAME, with a * at the end or without"),
    ({"devices": ["*"]}, "profile.x.devices: '*' is not a node of /dev: NAME or DIR/NAME, with a * at the end or without"),
    ({"devices": ["nvidia*x?"]}, "profile.x.devices: 'nvidia*x?' is not a node of /dev: NAME or DIR/NAME, with a * at the end or without"),
    ({"devices": ["mem"]}, "profile.x.devices: 'mem' is the node's memory; no payload gets it"),
    ({"devices": ["k*"]}, "profile.x.devices: 'k*' would also give 'kmem', which is given by its full name only"),
    ({"devices": ["mapper/*?"]}, "profile.x.devices: 'mapper/*?' would also give 'mapper/*', which is given by its full name only"),
])
def test_mistakes_are_one_line_with_their_place(table, said):
    assert profiles.check("x", table) == [said]


@pytest.mark.parametrize("path", ["etc", "/", "//etc", "/etc/", "/etc/../root", "/e tc", "/.", "/a/./b", "", "?", "/é", "/a\n", "/x" * 128, 5])
def test_paths_that_the_launcher_could_not_read_are_refused(path):
    assert len(profiles.check("x", {"read_only": [path]})) == 1


@pytest.mark.parametrize("name", ["x" * 32, "Strict", "../x", "", "-x", "a b"])
def test_names_of_profiles_are_plain(name):
    assert profiles.check(name, {})


@pytest.mark.parametrize(("change", "said"), [
    ({"namespaces": ["pid", "ipc"]}, "needs the mount namespace"), ({"namespaces": ["ipc", "mount"]}, "a fresh /proc shows a pid namespace"),
    ({"namespaces": ["pid", "mount"]}, "message queues belong to the ipc namespace"),
    ({"hostname": "x", "namespaces": ["pid", "ipc", "mount"]}, "would rename the node"), ({"system": []}, "the root is built from nothing"),
    ({"devices": []}, "the root is built from nothing"), ({"proc": False}, "nested containers need a /proc"),
    ({"read_only": ["/etc"], "writable": ["/etc?"]}, "can be mounted only once"),
])
def test_keys_that_contradict_each_other_are_refused(merged, change, said):
    lines = profiles.check("batch", {**merged["batch"], **change})
    assert [line for line in lines if said in line]


def test_a_sites_keys_replace_and_its_additions_append():
    site = {"batch": {"on_missing": "refuse", "add": {"read_only": ["/software"], "tmpfs": {"/scratch": "1GiB"}}}}
    found = profiles.merge(SHIPPED, site)
    assert found["batch"]["on_missing"] == "refuse"
    assert found["batch"]["read_only"] == [*SHIPPED["batch"]["read_only"], "/software"]
    assert found["batch"]["tmpfs"] == {**SHIPPED["batch"]["tmpfs"], "/scratch": "1GiB"}
    assert "/software" in found["compat"]["read_only"]  # compat is like batch, as the site has it
    assert found["strict"] == SHIPPED["strict"]


def test_a_sites_additions_to_a_profile_that_adds_keep_both():
    found = profiles.merge(SHIPPED, {"compat": {"add": {"read_only": ["/software"]}}})["compat"]
    assert {"/software", "/var/lib/dpkg?", "/etc"} <= set(found["read_only"])
    assert "/eos?" in found["follow_writable"]


def test_a_new_profile_starts_from_another_one():
    found = profiles.merge(SHIPPED, {"gpu": {"like": "compat", "home": False, "add": {"devices": ["nvidia0?"]}}})["gpu"]
    assert profiles.check("gpu", found) == []
    assert (found["home"], found["devices"][-1], found["namespaces"]) == (False, "nvidia0?", SHIPPED["batch"]["namespaces"])


def test_merging_changes_neither_argument():
    before = repr(SHIPPED)
    profiles.merge(SHIPPED, {"batch": {"add": {"read_only": ["/x"]}}})
    assert repr(SHIPPED) == before


@pytest.mark.parametrize(("site", "said"), [
    ({"a": {"like": "bath"}}, "there is no profile 'bath'; did you mean 'batch'?"), ({"a": {"like": "b"}, "b": {"like": "a"}}, "goes in a circle"),
    ({"a": {"like": "a"}}, "goes in a circle"),
])
def test_profiles_that_lead_nowhere_are_refused(site, said):
    with pytest.raises(profiles.ProfileError, match=said.replace("?", r"\?")):
        profiles.merge(SHIPPED, site)


def test_more_places_than_the_launcher_reads_are_refused(merged, node):
    table = {**merged["batch"], "read_only": [f"/site/{number}" for number in range(200)]}
    with pytest.raises(profiles.ProfileError, match="more than 160 places"):
        profiles.render({"batch": table}, str(node))


def test_the_file_for_this_very_node_is_accepted(merged):
    assert set(parse_profiles(profiles.render(merged).encode())) == set(merged)
    assert os.path.islink("/bin") == ("link /bin" in profiles.render(merged))


def test_the_page_about_isolation_says_what_profiles_and_filters_are():
    checkout = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, checkout / "packaging/isolation.py", "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_more_devices_than_a_line_holds_take_several_lines(node):
    names = [f"tty{number}" for number in range(40)]
    (node / "dev").unlink()
    (node / "dev").mkdir()
    for name in names:
        (node / "dev" / name).symlink_to("/dev/null")
    assert [op.path for op in ops({"devices": names}, node) if op.kind == "dev"] == names


def members(family):
    """Names of a family of devices."""
    pattern = "".join({"#": "[0-9]{1,3}", "*": "[a-z0-9]{0,4}"}.get(letter, re.escape(letter)) for letter in family)
    return st.from_regex(pattern, fullmatch=True, alphabet=st.characters(codec="ascii"))


@given(st.data(), st.sampled_from(profiles.BY_NAME_ONLY))
def test_no_pattern_catches_a_device_that_is_given_by_its_name_only(data, family):
    """Whatever its number on whatever node: any beginning of any of its names, with a star behind."""
    name = data.draw(members(family))
    cut = data.draw(st.integers(1, len(name)))
    assert profiles.check("x", {"devices": [name[:cut] + "*"]}), name[:cut]


@given(st.from_regex(r"[a-z]{1,4}[0-9]{0,2}[a-z]{0,2}", fullmatch=True, alphabet=st.characters(codec="ascii")))
def test_pattern_is_refused_only_for_a_family_that_has_a_name_which_begins_so(prefix):
    said = profiles.check("x", {"devices": [prefix + "*"]})
    if said:
        possible = {"#": "[0-9]+", "*": ".*"}
        literal = [family for family in profiles.BY_NAME_ONLY if family.startswith(prefix)]
        longer = [family for family in profiles.BY_NAME_ONLY for cut in range(1, len(family) + 1)
                  if re.fullmatch("".join(possible.get(letter, re.escape(letter)) for letter in family[:cut]), prefix)]
        assert literal or longer, said


@pytest.mark.parametrize("good", ["nvidia*", "nvidia-caps/*", "dri/renderD*", "kfd*", "infiniband/uverbs*", "fuse*", "ttyUSB*", "accel/accel*"])
def test_patterns_that_sites_need_are_given(good):
    assert profiles.check("x", {"devices": [good + "?"]}) == []


@pytest.mark.parametrize("bad", ["sg1*", "nvme1*", "ttyS1*", "tty63*", "hidraw12*", "st1*", "ng1n*", "cpu/1*", "bus/u*", "ipmi1*", "s*"])
def test_patterns_are_refused_by_any_number_that_a_device_may_have(bad):
    assert "given by its full name only" in profiles.check("x", {"devices": [bad]})[0]

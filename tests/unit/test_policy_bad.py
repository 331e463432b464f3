"""Bad policies, each with the exact lines that `nodewrap policy check` prints: file, line, code, what is wrong, next step."""

from __future__ import annotations

import os

import pytest

from nodewrap.policy import accounts, source
from tests.need import need
from tests.policy_tools import CALLER, SITE, compiled, lookup

RULE = '[[rule]]\nname = "r"\nwhen = { vo = "atlas" }\nidentity = { mode = "map" }\nprofile = "strict"\n'
SIZES = 'next: write a number with a unit (B, KiB, MiB, GiB, TiB), such as "4GiB"'
BASE = SITE + CALLER  # lines 1-6
M = "nodewrap.toml"

CORPUS = {
    "unknown key": (BASE + RULE + "limts = { wall = '1h' }\n", [f"{M}:12: NW-POLICY-KEY unknown key 'limts' in [rule]; did you mean 'limits'?"]),
    "unknown key in a table in a table": (
        BASE + '[[rule]]\nname = "r"\n# a comment\nidentity = { mode = "map" }\nprofile = "strict"\n[rule.limits]\nwal = "1h"\n',
        [f"{M}:13: NW-POLICY-KEY unknown key 'wal' in [rule.limits]; did you mean 'wall'?"]),
    "unknown table": (BASE + "[[rules]]\n", [f"{M}:7: NW-POLICY-KEY unknown key 'rules' in the policy; did you mean 'rule'?"]),
    "unknown value": (
        BASE.replace('map = "allow"', 'map = "alow"'),
        [f"{M}:4: NW-POLICY-VALUE site.modes.map is 'alow'; did you mean 'allow'?; "
         'next: write one of "no", "allow", "require", "undecided"']),
    "number without unit": (
        BASE + RULE + "limits = { wall = 72 }\n",
        [f'{M}:12: NW-POLICY-TYPE rule.limits.wall is a number 72; next: write a number with a unit (s, m, h, d, w), such as "72h"']),
    "wrong unit": (
        BASE + RULE + 'limits = { memory = "4GB" }\n',
        [f"{M}:12: NW-POLICY-VALUE rule.limits.memory is '4GB'; next: write a number with a unit (B, KiB, MiB, GiB, TiB), such as \"4GiB\""]),
    "date in quotes": (
        BASE + RULE + 'expires = "2027-06-30"\n',
        [f"{M}:12: NW-POLICY-TYPE rule.expires is a text '2027-06-30'; next: write a date without quotes, such as 2027-06-30"]),
    "local time": (
        BASE + RULE + "expires = 2027-06-30T12:00:00\n",
        [f"{M}:12: NW-POLICY-VALUE rule.expires has no time zone; next: append Z, or write the date alone"]),
    "table for a list": (
        SITE + "[caller]\naccount = 'x'\n", [f"{M}:5: NW-POLICY-TYPE caller is a table; next: write a list in square brackets"]),
    "yes as a boolean": (
        BASE.replace('"yes"', "true"),
        [f'{M}:3: NW-POLICY-TYPE site.multi_user is true or false True; next: write one of "yes", "no", "undecided"']),
    "empty list": (
        BASE + RULE.replace('vo = "atlas"', "fqan = []"),
        [f"{M}:9: NW-POLICY-VALUE rule.when.fqan is an empty list, which nothing matches; next: name something or delete the key"]),
    "wildcard in the VO": (
        BASE + RULE.replace('vo = "atlas"', 'fqan = ["/atlas*"]'),
        [f"{M}:9: NW-POLICY-VALUE rule.when.fqan is '/atlas*'; next: write an FQAN pattern such as /atlas/* (the group and all below); "
         "a VO's name takes no wildcard"]),
    "image that is relative": (
        BASE + RULE.replace('"strict"', '"batch"') + 'image = "images/el9.sif"\n',
        [f"{M}:12: NW-POLICY-VALUE rule.image is 'images/el9.sif'; next: write an absolute path without '..', "
         "or a pattern such as /cvmfs/images.example.org/*"]),
    "image where no container can be made": (
        BASE + RULE + 'image = "/images/*"\n',
        [f"{M}:11: NW-POLICY-CONTRADICTION no container can be made in strict: "
         "it takes pid and mount namespaces and nested_userns; next: add batch"]),
    "backend without images": (
        BASE + RULE + 'backend = "apptainer"\n',
        [f"{M}:12: NW-POLICY-MISSING backend without images allows nothing; next: add image = [PATH or pattern, …]"]),
    "option that Apptainer's user must not have": (
        BASE + RULE.replace('"strict"', '"batch"') + 'image = "/images/*"\napptainer = { options = ["no-prvs"] }\n',
        [f"{M}:13: NW-POLICY-VALUE rule.apptainer.options is 'no-prvs'; did you mean 'no-privs'?; next: write one of "
         '"nv", "rocm", "writable-tmpfs", "fakeroot", "unsquash", "underlay", "no-init", "no-umask", "cleanenv", "pid", "ipc", "userns", '
         '"no-privs"']),
    "not TOML": (
        BASE + "[[rule]\n",
        [f"{M}:7: NW-POLICY-SYNTAX not TOML in column 7: Expected ']]' at the end of an array declaration; next: correct this line"]),
    "key twice": (BASE + 'site = "x"\nsite = "y"\n', None),
    "no site": (CALLER + RULE, [f"{M}:1: NW-POLICY-MISSING there is no [site]; next: add one with name, multi_user and modes"]),
    "incomplete site": ('[site]\nname = "T"\nmulti_user = "yes"\n' + CALLER, [f"{M}:1: NW-POLICY-MISSING site has no 'modes'; next: add it"]),
    "rule name twice": (
        BASE + RULE + RULE.replace("atlas", "cms"),
        [f"{M}:13: NW-POLICY-DUPLICATE rule 'r' is already in {M}:8; next: rename one, or delete it"]),
    "unreachable rule": (
        BASE + RULE.replace('when = { vo = "atlas" }\n', "") + RULE.replace('"r"', '"s"'),
        [f"{M}:11: NW-POLICY-UNREACHABLE rule 's' is never reached: rule 'r' ({M}:7) matches first; next: move it up, or delete it"]),
    "rule behind a wider pattern": (
        BASE + RULE.replace("{ vo", '{ fqan = "/atlas/*", vo') + RULE.replace('"r"', '"s"').replace("{ vo", '{ fqan = "/atlas/uk/*", vo'),
        [f"{M}:12: NW-POLICY-UNREACHABLE rule 's' is never reached: rule 'r' ({M}:7) matches first; next: move it up, or delete it"]),
    "vo and fqan of another": (
        BASE + RULE.replace("{ vo", '{ fqan = "/cms/*", vo'),
        [f"{M}:9: NW-POLICY-CONTRADICTION rule 'r' asks for vo atlas and for fqans of cms: nobody has both; next: correct one"]),
    "weaker profile to ask for": (
        BASE + RULE.replace('"strict"', '["strict", "none"]'),
        [f"{M}:11: NW-POLICY-WEAKER profile ['strict', 'none'] lets a pilot ask for less than it would get; "
         "next: write the weakest first, the others may be asked for"]),
    "no such profile": (
        BASE + RULE.replace('"strict"', '"stict"'),
        [f"{M}:11: NW-POLICY-REFERENCE there is no profile 'stict'; did you mean 'strict'?; next: add [profile.stict], or use another"]),
    "no such pool": (
        BASE + RULE.replace('"map"', '"switch", pool = "usrr"') + '[pool.usr]\naccounts = ["usr01"]\n',
        [f"{M}:10: NW-POLICY-REFERENCE there is no [pool.usrr]; did you mean 'usr'?; next: add it"]),
    "no such host group": (
        BASE + RULE.replace("{ vo", '{ host = "@gpu", vo'),
        [f"{M}:9: NW-POLICY-REFERENCE there is no host group 'gpu' in [hosts]; next: add it"]),
    "no such assertion": (BASE + RULE + 'needs = "x"\n', [f"{M}:12: NW-POLICY-REFERENCE there is no [assertion.x]; next: add it"]),
    "unknown account": (
        BASE + RULE.replace('"map"', '"switch", account = "ghost"'),
        [f"{M}:10: NW-POLICY-ACCOUNT account 'ghost' does not exist on this node; next: create it, or correct the name"]),
    "account in two pools": (
        BASE + '[pool.a]\naccounts = ["usr[01-02]"]\n[pool.b]\naccounts = ["usr02"]\n',
        [f"{M}:10: NW-POLICY-ACCOUNT account 'usr02' is already in a pool ({M}:8), and a lease is for one run; next: keep one"]),
    "caller as target": (
        SITE + '[[caller]]\naccount = ["usr*"]\n' + RULE.replace('"map"', '"switch", account = "usr01"'),
        [f"{M}:10: NW-POLICY-ACCOUNT account 'usr01' is a [[caller]], and a payload must not call; next: use another account"]),
    "caller by its uid as target": (
        SITE + '[[caller]]\nuid = "20000-20001"\n' + RULE.replace('"map"', '"switch", account = "usr01"'),
        [f"{M}:10: NW-POLICY-ACCOUNT account 'usr01' is a [[caller]], and a payload must not call; next: use another account"]),
    "empty pool": (
        BASE + '[pool.a]\nprefix = "nwnosuchprefix"\n',
        [f"{M}:7: NW-POLICY-ACCOUNT pool 'a' has no account on this node; next: create them, or correct the names"]),
    "range backwards": (
        BASE + '[pool.a]\naccounts = ["usr[09-01]"]\n',
        [f"{M}:7: NW-POLICY-ACCOUNT pool 'a' has no account on this node; next: create them, or correct the names",
         f"{M}:8: NW-POLICY-VALUE range 'usr[09-01]' is empty or has more than 10000 names; next: write the smaller number first, or split it"]),
    "ban of nobody": (
        BASE + "[[ban]]\nreason = 'x'\n",
        [f"{M}:7: NW-POLICY-MISSING this [[ban]] names nobody; next: add dn, fqan, vo, issuer (and sub) or caller"]),
    "sub without issuer": (
        BASE + "[[ban]]\nvo = 'x'\nsub = 'y'\n", [f"{M}:9: NW-POLICY-MISSING a token's sub means something only with its issuer; next: add issuer"]),
    "block without the id": (
        BASE + RULE.replace('"map"', '"map", size = 1000'),
        [f"{M}:10: NW-POLICY-VALUE ids 0 to 999 do not hold 1000; next: write a larger size, or a smaller id"]),
    **{
        f"limit {text}": (BASE + RULE + f"limits = {{ {text} }}\n", [f"{M}:12: {problem}"]) for text, problem in {
            'memory = "0B"': "NW-POLICY-VALUE rule.limits.memory is '0B'; next: write at least \"16MiB\", or delete the key",
            'memory = "1KiB"': "NW-POLICY-VALUE rule.limits.memory is '1KiB'; next: write at least \"16MiB\", or delete the key",
            'memory = "-4GiB"': f"NW-POLICY-VALUE rule.limits.memory is '-4GiB'; {SIZES}",
            'memory = "99999999TiB"': f"NW-POLICY-VALUE rule.limits.memory is '99999999TiB'; {SIZES}",
            "memory = 4": f"NW-POLICY-TYPE rule.limits.memory is a number 4; {SIZES}",
            'scratch = "0B"': "NW-POLICY-VALUE rule.limits.scratch is '0B'; next: write at least \"1MiB\", or delete the key",
            'file_size = "1B"': "NW-POLICY-VALUE rule.limits.file_size is '1B'; next: write at least \"4KiB\", or delete the key",
            'cpu = "0s"': "NW-POLICY-VALUE rule.limits.cpu is '0s'; next: write at least \"1s\", or delete the key",
            "processes = 0": "NW-POLICY-VALUE rule.limits.processes is 0; next: write a number from 1 to 4000000",
            "processes = -1": "NW-POLICY-VALUE rule.limits.processes is -1; next: write a number from 1 to 4000000",
            "files = 15": "NW-POLICY-VALUE rule.limits.files is 15; next: write a number from 16 to 1048576",
            "cpus = 0": "NW-POLICY-VALUE rule.limits.cpus is 0; next: write a number of processors from 0.01 to 8192",
            "cpus = nan": "NW-POLICY-VALUE rule.limits.cpus is nan; next: write a number of processors from 0.01 to 8192",
            "cpus = true": "NW-POLICY-TYPE rule.limits.cpus is true or false True; next: write a number of processors, such as 4 or 1.5",
            "cpu_weight = 0": "NW-POLICY-VALUE rule.limits.cpu_weight is 0; next: write a number from 1 to 10000",
            "io_weight = 10001": "NW-POLICY-VALUE rule.limits.io_weight is 10001; next: write a number from 1 to 10000",
            "io_weight = -1": "NW-POLICY-VALUE rule.limits.io_weight is -1; next: write a number from 1 to 10000",
            'io_read = "0B"': "NW-POLICY-VALUE rule.limits.io_read is '0B'; next: write at least \"64KiB\", or delete the key",
            'io_write = "1KiB"': "NW-POLICY-VALUE rule.limits.io_write is '1KiB'; next: write at least \"64KiB\", or delete the key",
            'io_write = "-1MiB"': f"NW-POLICY-VALUE rule.limits.io_write is '-1MiB'; {SIZES}",
            'io_read = "99999999TiB"': f"NW-POLICY-VALUE rule.limits.io_read is '99999999TiB'; {SIZES}",
            "io_read_ops = 0": "NW-POLICY-VALUE rule.limits.io_read_ops is 0; next: write a number from 10 to 1000000000",
            "io_write_ops = -5": "NW-POLICY-VALUE rule.limits.io_write_ops is -5; next: write a number from 10 to 1000000000",
            'on_missing = "ignore"': "NW-POLICY-VALUE rule.limits.on_missing is 'ignore'; next: write one of \"refuse\", \"degrade\"",
        }.items()
    },
    "grace beyond the launcher's": (
        BASE + RULE + 'limits = { grace = "11m" }\n',
        [f"{M}:12: NW-POLICY-VALUE rule.limits.grace is '11m'; next: write a number with a unit (s, m, h, d, w), such as \"30s\" (at most \"10m\")"]),
    "pool beyond the launcher's": (
        BASE + '[pool.a]\naccounts = ["usr[0001-0513]"]\n',
        [f"{M}:7: NW-POLICY-ACCOUNT pool 'a' has 513 accounts, the launcher takes 512; next: a node needs one for each job slot, name fewer"]),
    "variable that runs code": (
        BASE + RULE + 'env = { keep = ["LD_PRELOAD"] }\n',
        [f"{M}:12: NW-POLICY-ENV 'LD_PRELOAD' never reaches a payload: it runs code, or is the pilot's credential; next: delete it"]),
    "log-only without liability": (
        BASE.replace('"T"', '"T"\nliability_for = ["log-only"]') + RULE.replace('"map"', '"log-only"'),
        [f"{M}:8: NW-POLICY-LIABILITY rule 'r' gives log-only, and site.liability_for wants a liability; next: add {{ by, on, reference }}"]),
    "site that refuses every mode": (
        BASE.replace('"allow"', '"no"'),
        [f"{M}:3: NW-POLICY-CONTRADICTION warning: multi_user = yes, and no mode of identity is allowed: every payload will be refused; "
         "next: allow a mode, or say multi_user = no"]),
    "weaker mode beside a required one": (
        BASE.replace('switch = "allow", map = "allow"', 'switch = "require", map = "no"'),
        [f"{M}:4: NW-POLICY-CONTRADICTION warning: modes.log-only = allow, and switch is required, which is more: log-only will be refused; "
         "next: say no, or require less"]),
    "rule for a mode that the site refuses": (
        BASE.replace('map = "allow"', 'map = "no"') + RULE,
        [f"{M}:10: NW-POLICY-CONTRADICTION warning: rule 'r' gives map, which the site's modes refuse: it can only deny; "
         "next: change modes or the rule"]),
    "profile with an unknown key": (
        BASE + '[profile.batch]\nnamespace = ["pid"]\n',
        [f"{M}:8: NW-POLICY-PROFILE profile.batch.namespace: unknown key; did you mean 'namespaces'?"]),
    "control character in a text": (
        BASE + '[[ban]]\nvo = "x"\nreason = "a\\nb"\n',
        [f"{M}:9: NW-POLICY-VALUE ban.reason has control characters or more than 1000 characters; next: shorten it to one line"]),
}


@pytest.mark.parametrize("name", [name for name, (_, lines) in CORPUS.items() if lines])
def test_bad_policy_is_reported_with_file_line_and_next_step(tmp_path, name):
    text, lines = CORPUS[name]
    policy, problems = compiled(tmp_path, text)
    assert problems == lines
    assert (policy is None) == any(" warning: " not in line for line in lines)


@pytest.mark.parametrize("term", ["expires = 2099-01-01\n", "not_before = 2026-01-01\n", 'needs = "x"\n'])
def test_rule_that_is_not_always_in_force_hides_no_other(tmp_path, term):
    assertion = '[assertion.x]\ntext = "x"\n'
    assert compiled(tmp_path, BASE + RULE + term + RULE.replace('"r"', '"s"') + assertion)[1] == []


def test_key_written_twice_is_an_error(tmp_path):
    policy, problems = compiled(tmp_path, CORPUS["key twice"][0])
    assert policy is None
    assert [line.split(" ")[1] for line in problems] == ["NW-POLICY-SYNTAX"]


def test_every_problem_is_reported_at_once(tmp_path):
    text = BASE.replace('"yes"', '"yse"') + RULE.replace('"map"', '"mapp"') + "expires = 3\nfoo = 1\n"
    assert [line.split(":")[1] for line in compiled(tmp_path, text)[1]] == ["3", "10", "12", "13"]


def test_files_of_policy_d_are_joined_and_a_key_set_twice_names_both_places(tmp_path):
    more = {"10-bans.toml": '[[ban]]\ndn = "/CN=x"\n', "20-more.toml": '# x\n[site]\ncontact = "a"\nname = "U"\n' + RULE, "ignored.txt": "[["}
    policy, problems = compiled(tmp_path, BASE + '[[ban]]\nvo = "y"\n', drop_ins=more)
    assert problems == [f"policy.d/20-more.toml:4: NW-POLICY-DUPLICATE site.name is already set in {M}:2; next: keep one of the two"]
    assert policy is None
    (tmp_path / "policy.d" / "20-more.toml").write_text('[site]\ncontact = "a"\n' + RULE.replace("map", "mapp"))
    assert compiled(tmp_path, BASE + '[[ban]]\nvo = "y"\n')[1][0].startswith("policy.d/20-more.toml:6: NW-POLICY-VALUE rule.identity.mode is 'mapp'")


def test_missing_policy_is_an_error(tmp_path):
    assert [str(p) for p in source.read(str(tmp_path)).problems] == [
        f"{tmp_path}/{M}:1: NW-POLICY-READ cannot be read (No such file or directory); next: create it or fix its mode"]


# --- who may write a policy --------------------------------------------------------------------------------------------------------------


def distrust(tmp_path):
    return [problem.text for problem in source.read(str(tmp_path)).problems if problem.code == "NW-POLICY-OWNER"]


@pytest.fixture
def config(tmp_path):
    (tmp_path / M).write_text(BASE)
    (tmp_path / M).chmod(0o644)
    tmp_path.chmod(0o755)
    assert distrust(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize(("mode", "who"), [(0o664, "group"), (0o646, "anyone"), (0o666, "group")])
def test_file_that_others_may_write_is_refused(config, mode, who):
    (config / M).chmod(mode)
    assert distrust(config) == [f"{config}/{M} is writable by {who} (mode {mode:04o}); next: chmod go-w {config}/{M}"]
    assert compiled(config, BASE)[0] is None


@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_file_in_a_directory_that_others_may_write_is_refused(config, mode):
    config.chmod(mode)
    assert len(distrust(config)) == 1


def test_link_into_a_directory_that_others_may_write_is_refused(config, tmp_path_factory):
    other = tmp_path_factory.mktemp("open")
    (other / "x.toml").write_text(BASE)
    (config / M).unlink()
    (config / M).symlink_to(other / "x.toml")
    assert distrust(config) == []
    other.chmod(0o777)
    assert len(distrust(config)) == 1


def test_file_of_another_user_is_refused(config):
    need("root")
    os.chown(config / M, 1234, 0)
    assert distrust(config) == [f"{config}/{M} belongs to uid 1234; next: chown root {config}/{M}"]


def test_fifo_is_refused_without_waiting_for_a_writer(config):
    (config / M).unlink()
    os.mkfifo(config / M, 0o644)
    assert distrust(config) == ["is not a regular file; next: put a file there"]


def test_huge_file_is_refused(config):
    (config / M).write_text("#" * (source.MAX_BYTES + 1))
    assert distrust(config) == [f"is larger than {source.MAX_BYTES} bytes; next: split it into policy.d/"]


# --- accounts of this machine ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["root", "daemon", "nobody", "bin"])
def test_system_account_is_no_target(name):
    with pytest.raises(accounts.AccountError, match=f"account '{name}' has uid"):
        accounts.lookup(name)


def test_missing_account_is_no_target():
    with pytest.raises(accounts.AccountError, match="does not exist"):
        accounts.lookup("nwnosuchaccount")


def test_pool_accounts_of_this_machine_are_looked_up_and_refused_in_roots_groups(session):
    need("root")
    names = [account.name for account in session.accounts.values()]
    found = accounts.lookup(names[0])
    assert found["uid"] >= 1000
    assert found["gid"] in found["groups"]
    with pytest.raises(accounts.AccountError, match="system group"):
        accounts._refuse_ids("x", 5000, [0])
    with pytest.raises(accounts.AccountError, match="gives more than a user has"):
        accounts._refuse_groups("x", [0])


def test_account_in_more_groups_than_the_launcher_takes_is_refused():
    with pytest.raises(accounts.AccountError, match="is in 33 groups"):
        accounts._refuse_groups("x", list(range(5000, 5033)))


def test_range_keeps_its_width():
    assert accounts.expand("wn[008-011].x") == ["wn008.x", "wn009.x", "wn010.x", "wn011.x"]
    assert accounts.expand("plain") == ["plain"]


def test_account_in_a_callers_group_is_no_target(tmp_path):
    text = SITE + '[[caller]]\ngroup = "root"\n' + RULE.replace('"map"', '"switch", account = "usr01"')
    for gid, wanted in ((0, 1), (20001, 0)):
        _, problems = compiled(tmp_path, text, find=lambda name, gid=gid: {**lookup(name), "groups": [gid]})
        assert len([line for line in problems if "is a [[caller]]" in line]) == wanted

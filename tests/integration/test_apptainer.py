"""Payloads in containers (docs/apptainer.md), by the real Apptainer: every mode and launcher, images good and bad, what must stay as it is."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess

import pytest

from tests import container
from tests.integration.test_policyd import Resident
from tests.need import need
from tests.node import KINDS, until

SEES = "cat /made-for-the-test; id -u; pwd; echo $HOME; echo kept >made; test -e /proc/1/root/etc && echo peeked; ls -d $1 2>/dev/null; exit 7"


@pytest.fixture(scope="module")
def images(session, home):
    """A directory of images where no profile shows it. directory, sif: images of root's; own: the pilot's, for itself alone."""
    need("root")
    container.program()
    top = home / "images"
    top.mkdir()
    directory, pilot = container.tree(top / "directory"), session.accounts["pilot"]
    built = container.sif(top / "image.sif", directory, pilot)
    os.chown(built, 0, 0)
    shutil.copy2(built, top / "own.sif")
    os.chown(top / "own.sif", pilot.uid, pilot.gid)
    (top / "own.sif").chmod(0o600)
    yield top
    shutil.rmtree(top)


@pytest.fixture
def work(home, session):
    path = home / "contained"
    path.mkdir()
    os.chown(path, session.accounts["pilot"].uid, session.accounts["pilot"].gid)
    yield path
    shutil.rmtree(path)


def policy(node, image, more="", batch=False, runtime=None):
    """Every rule allows these images; batch shows the test's Apptainer, or the runtime given."""
    listed = ", ".join(f'"{one}"' for one in image)
    text = node.policy_text().replace('profile = ["none", "compat", "batch"', 'profile = ["batch"') if batch else node.policy_text()
    text = text.replace('"batch", "strict"]\n', f'"batch", "strict"]\nimage = [{listed}]\n{more}\n')
    shown = f'[profile.batch]\nadd = {{ read_only = ["{runtime}"] }}\n' if runtime else container.profile()
    node.site.policy(f'{text}\n[apptainer]\nprogram = "{runtime or container.program()}"\n{shown}')


@pytest.fixture(params=["setuid", "userns"])
def boxed(request, images):
    """A node that allows the images by a pattern."""
    node = request.getfixturevalue(f"{request.param}_node")
    policy(node, [f"{images}/*"])
    return node


@pytest.fixture
def setuid_boxed(setuid_node, images):
    policy(setuid_node, [f"{images}/*"])
    return setuid_node


def cases():
    for launcher, kinds in KINDS.items():
        for kind in kinds:
            yield from (pytest.param(launcher, kind, image, id=f"{launcher}-{kind}-{image}") for image in ("directory", "own.sif"))


@pytest.mark.parametrize(("launcher", "kind", "image"), list(cases()))
def test_command_runs_in_the_image_under_its_own_identity(request, images, work, launcher, kind, image):
    if (launcher, kind) == ("userns", "block"):
        request.getfixturevalue("delegated")
    node = request.getfixturevalue(f"{launcher}_node")
    policy(node, [f"{images}/*"])
    ran = node.sh(kind, SEES, images, options=["--image", images / image, "--workdir", work])
    if (launcher, kind, image) == ("userns", "block", "own.sif"):  # another id than the pilot's, and no privilege to map the file to it
        refused(ran, 201, "NW-IMAGE", "chmod")
        return
    assert (ran.rc, ran.err) == (7, b""), ran
    uid = {"static": node.site.accounts.get("user1"), "log-only": node.pilot}.get(kind)
    said = ran.text.split()
    assert said[0] == "yes"
    assert said[1] == str(uid.uid) if uid else said[1].isdigit()
    assert said[2:] == [str(work), str(work)]
    assert (work / "made").stat().st_uid == node.pilot.uid
    assert os.listdir(work) == ["made"]  # the runtime's own files are elsewhere
    told, digest = ran.record("start")["nodewrap"], hashlib.sha256((images / "own.sif").read_bytes()).hexdigest()
    info, path = (images / image).stat(), images / image
    assert told["declared"]["image"] == told["image"]["path"] == str(path)
    assert told["image"]["file"] == (
        f"dev={info.st_dev} ino={info.st_ino} size={info.st_size} mtime={info.st_mtime_ns} ctime={info.st_ctime_ns} uid={info.st_uid}")
    assert (told["image"]["kind"], told["image"].get("digest")) == (("directory", None) if image == "directory" else ("sif", digest_of(path, digest)))
    assert ran.record("start")["process"]["args"][:2] == ["/bin/sh", "-c"]  # the payload's own words, not the runtime's
    assert ran.record("exit")["process"]["exit_code"] == 7


def digest_of(path, whole):
    """Files of up to 1 MiB are digested as a whole, larger ones by their head."""
    if path.stat().st_size <= 1 << 20:
        return f"sha256:{whole}"
    return "sha256-first-32768:" + hashlib.sha256(path.read_bytes()[:32768]).hexdigest()


@pytest.mark.parametrize(
    ("script", "code"), [("exit 42", 42), ("kill -TERM $$", 143), ("kill -KILL $$", 137), ("exit 203", 204), ("exit 255", 255), ("exit 126", 126)])
def test_end_of_the_command_comes_out_as_without_a_container(boxed, images, script, code):
    ran = boxed.sh("map", script, options=["--image", images / "directory"])
    assert (ran.rc, ran.out, ran.err) == (code, b"", b"")


def check_no_container(ran, *says):
    """202 and one line with the runtime's reason; what was started is on record with its end, and with why."""
    assert (ran.rc, ran.out) == (202, b""), ran
    assert ran.err.startswith(b"nodewrap: NW-APPTAINER: the payload's command was not reached; "), ran
    assert ran.err.count(b"\n") == 1
    assert all(word.encode() in ran.err for word in says), ran
    assert ran.record("error")["event"]["code"] == "NW-APPTAINER"
    assert [record["event"]["action"] for record in ran.records if record["event"]["action"] != "degrade"] == [
        "authorize", "start", "exit", "cleanup", "error"]


@pytest.mark.parametrize("option", ["", "pid"])
def test_runtime_that_fails_before_the_command_is_an_internal_error_with_its_reason(boxed, images, option):
    policy(boxed, [f"{images}/*"], f'apptainer = {{ bind = ["/not/there"], options = {[option] if option else []} }}')
    ran = boxed.sh("map", "echo ran", options=["--image", images / "directory"])
    check_no_container(ran, "ended with 255", "FATAL:", "/not/there doesn't exist")


def test_image_that_is_damaged_behind_its_header_is_an_internal_error_with_the_reason(boxed, images):
    path = images / "damaged.sif"
    whole = (images / "image.sif").read_bytes()
    path.write_bytes(whole[:32768] + b"\0" * (len(whole) - 32768))
    check_no_container(boxed.sh("map", "echo ran", options=["--image", path]), "FATAL:")
    path.unlink()


@pytest.mark.parametrize("says", ["exit 0", "echo >&2 'FATAL: \033[1mno luck\r'; exit 255", "head -c 1000000 /dev/zero | tr '\\0' x >&2; exit 3"])
def test_runtime_that_ends_by_itself_is_never_taken_for_the_command(boxed, images, session, says):
    fake = session.top / "fake-runtime"
    fake.write_text(f"#!/bin/sh\n{says}\n")
    fake.chmod(0o755)
    policy(boxed, [f"{images}/*"], runtime=fake)
    ran = boxed.sh("map", "echo ran", options=["--image", images / "directory"])
    check_no_container(ran, f"ended with {says[-3:].split()[-1]}")
    assert not re.search(rb"[\x00-\x1f\x7f]", ran.err[:-1])
    fake.unlink()


def test_status_descriptor_tells_a_container_that_was_not_made_from_a_command_that_failed(boxed, images):
    for bind, code, word in (("/not/there", 202, "NW-APPTAINER"), ("/usr", 7, None)):
        policy(boxed, [f"{images}/*"], f'apptainer = {{ bind = ["{bind}"] }}')
        live = boxed.start("map", "/bin/sh", "-c", "exit 7", options=["--image", str(images / "directory")])
        assert live.end()[0] == code
        assert [live.events[-1].get(name) for name in ("event", "exit", "code")] == ["exited", code, word]


@pytest.mark.parametrize(("command", "code"), [("not-there", 127), ("/not/there", 127), ("/etc/passwd", 126)])
def test_command_that_the_image_does_not_have_is_told_as_without_a_container(boxed, images, command, code):
    ran = boxed.run("map", command, "word", profile="batch", options=["--image", images / "directory"])
    assert (ran.rc, ran.out) == (code, b""), ran
    assert ran.err.startswith(f"nodewrap: NW-EXEC: cannot execute in the image {command}: ".encode()), ran
    assert ran.err.count(b"\n") == 1
    assert ran.record("error")["event"]["code"] == "NW-EXEC"


def test_command_that_says_what_the_runtime_would_is_taken_at_its_own_exit_code(boxed, images):
    ran = boxed.sh("map", "echo 'FATAL: container creation failed' >&2; exit 255", options=["--image", images / "directory"])
    assert (ran.rc, ran.err) == (255, b"FATAL: container creation failed\n")
    assert ran.record("exit")["process"]["exit_code"] == 255
    assert "error" not in [record["event"]["action"] for record in ran.records]


def test_image_without_shell_or_anything_else_runs_its_one_program(boxed, images):
    top = images / "bare"
    for name in ("dev", "etc", "proc", "sys", "tmp", "var/tmp"):
        (top / name).mkdir(parents=True)
    for name in ("etc/passwd", "etc/group"):  # Apptainer warns when it cannot put its own there
        (top / name).touch()
    shutil.copy2(images / "directory/bin/busybox", top / "true")
    ran = boxed.run("map", "/true", profile="batch", options=["--image", top])
    assert (ran.rc, ran.out, ran.err) == (0, b"", b""), ran
    shutil.rmtree(top)


def test_command_has_the_pilots_stderr_and_no_descriptor_of_the_container(boxed, images):
    """What the runtime warns of is not lost: underlay is an option that it calls deprecated."""
    policy(boxed, [f"{images}/*"], 'apptainer = { options = ["underlay"] }')
    ran = boxed.sh("map", "ls /proc/self/fd; echo told >&2", options=["--image", images / "directory"])
    assert (ran.rc, ran.text.split()) == (0, ["0", "1", "2", "3"]), ran  # 3: the directory that ls reads
    assert re.fullmatch(rb"[^\n]*WARNING[^\n]*underlay[^\n]*\ntold\n", ran.err), ran


def test_command_cannot_make_itself_a_runtime_that_failed(boxed, images):
    """With the option pid the runtime's own process 1 keeps the descriptors, and is the payload's user's."""
    policy(boxed, [f"{images}/*"], 'apptainer = { options = ["pid"] }')
    script = "for fd in /proc/1/fd/*; do (timeout 1 head -c 64 $fd; echo FATAL: mine >$fd) 2>/dev/null; done </dev/null >/dev/null; exit 255"
    own = boxed.site.prefix / "libexec/nodewrap/nodewrap-inside"
    before = own.read_bytes()
    ran = boxed.sh("map", script, options=["--image", images / "directory"])
    assert ran.rc == 255, ran
    assert b"NW-" not in ran.err
    assert own.read_bytes() == before  # which under the userns launcher may be the payload's user's


def test_signal_reaches_the_command_and_nothing_of_the_container_is_left(boxed, images):
    script = "trap 'echo told; exit 9' TERM; echo up; sleep 60 & sleep 60 & wait"
    live = boxed.start("map", "/bin/sh", "-c", script, options=["--image", str(images / "own.sif")])
    assert live.process.stdout.readline() == b"up\n"
    live.process.terminate()
    assert live.end()[:2] == (9, b"told\n")


def test_pilots_sudden_death_ends_the_container(boxed, images):
    live = boxed.start("map", "/bin/sh", "-c", "echo up; sleep 60", options=["--image", str(images / "own.sif")])
    assert live.process.stdout.readline() == b"up\n"
    live.process.kill()
    live.process.wait()
    until(lambda: not any(boxed.leftovers()[kind] for kind in ("processes", "launchers")), "its processes are gone")
    live.close()
    boxed.sweep()


def test_payload_cannot_write_to_an_image_of_its_pilots(boxed, images, work):
    shutil.copytree(images / "directory", work / "image", symlinks=True)
    for top, _, _ in os.walk(work / "image"):
        os.chown(top, boxed.pilot.uid, boxed.pilot.gid)
    policy(boxed, [f"{work}/*"], 'apptainer = { bind = ["/.image:/mnt"] }')
    (work / "image/mnt").mkdir()
    ran = boxed.sh("log-only", "cat /mnt/made-for-the-test; touch /mnt/etc/evil", options=["--image", work / "image"])
    assert (ran.rc, ran.out) == (1, b"yes\n"), ran
    assert b"Read-only file system" in ran.err


def test_glexec_and_a_rule_with_a_backend_use_the_rules_own_image(setuid_node, images):
    policy(setuid_node, [images / "directory"], 'backend = "apptainer"')
    ran = setuid_node.sh("static", "cat /made-for-the-test; env | grep NODEWRAP_IMAGE")
    assert (ran.rc, ran.err, ran.text.split()) == (0, b"", ["yes", f"NODEWRAP_IMAGE={images}/directory"]), ran
    assert "image" not in ran.record("start")["nodewrap"]["declared"]
    policy(setuid_node, [f"{images}/*"], 'backend = "apptainer"')
    refused(setuid_node.sh("static", "true"), 201, "NW-IMAGE", "--image")


def test_resident_policy_child_rehearses_and_decides_with_images(setuid_node, images):
    resident = Resident(setuid_node.site)
    try:
        setuid_node.open_guard(deadline_ms="4000", policyd=str(resident.path))
        policy(setuid_node, [images / "directory"], 'backend = "apptainer"', batch=True)
        for _ in range(12):  # more than there were workers before the policy changed
            ran = setuid_node.sh("log-only", "cat /made-for-the-test")
            assert (ran.rc, ran.out, ran.err) == (0, b"yes\n", b""), ran
        refused(setuid_node.sh("log-only", "true", options=["--image", "/usr"]), 203, "NW-IMAGE-DENIED", "/usr")
    finally:
        resident.stop()
        resident.process.stderr.close()


# ---- images that are none, or not this site's ----


def refused(ran, code, name, *says):
    """Refused with that exit code and name, in one line; nothing was started."""
    assert (ran.rc, ran.out) == (code, b""), ran
    assert ran.err.startswith(f"nodewrap: {name}: ".encode()), ran
    assert ran.err.count(b"\n") == 1
    assert all(word.encode() in ran.err for word in says), ran
    assert [record["event"]["action"] for record in ran.records] == ["deny" if code == 203 else "error"]


def bad_images(top, pilot):
    """name: (exit code, NW-…, word of the message)."""
    (top / "text").write_text("#!/bin/sh\necho an image\n")
    (top / "empty").touch()
    os.mkfifo(top / "fifo", 0o666)
    os.mknod(top / "device", 0o666 | 0o020000, os.makedev(1, 3))
    (top / "locked").mkdir(mode=0o700)
    container.tree(top / "locked/below")
    (top / "circle").symlink_to("circle")
    (top / "out").symlink_to("/")
    (top / "usr").symlink_to("/usr")
    (top / "magic").symlink_to("/proc/self/root/usr")
    return {
        "missing": (201, "NW-IMAGE", "does not exist"), "text": (201, "NW-IMAGE", "not an image"), "empty": (201, "NW-IMAGE", "not an image"),
        "fifo": (201, "NW-IMAGE", "neither a file nor a directory"), "device": (201, "NW-IMAGE", "neither a file nor a directory"),
        "locked/below": (201, "NW-IMAGE", "cannot be read"), "circle": (201, "NW-IMAGE", "links"), "text/below": (201, "NW-IMAGE", "through a file"),
        "out": (203, "NW-IMAGE-DENIED", "image"), "usr": (203, "NW-IMAGE-DENIED", "/usr"), "magic": (201, "NW-IMAGE", ""),
    }


def test_what_is_no_image_or_is_elsewhere_is_refused_with_the_reason(boxed, images):
    top = images / "bad"
    top.mkdir()
    for name, (code, word, says) in bad_images(top, boxed.pilot).items():
        refused(boxed.sh("map", "true", options=["--image", top / name]), code, word, says)
    shutil.rmtree(top)
    refused(boxed.sh("map", "true", options=["--image", "/usr"]), 203, "NW-IMAGE-DENIED", "/usr")


def test_image_without_a_rule_for_images_is_denied(setuid_node, images):
    setuid_node.open_policy()
    refused(setuid_node.sh("map", "true", options=["--image", images / "directory"]), 203, "NW-IMAGE-DENIED", "leave --image out")


@pytest.mark.parametrize("profile", ["strict", "none"])
def test_profile_in_which_no_container_can_be_made_is_refused(boxed, images, profile):
    refused(boxed.sh("map", "true", profile=profile, options=["--image", images / "directory"]), 203, "NW-IMAGE-PROFILE", profile)


def test_file_that_the_policy_names_has_its_digest_and_is_refused_once_changed(boxed, images):
    path = images / "named.sif"
    shutil.copy2(images / "image.sif", path)
    policy(boxed, [path])
    ran = boxed.sh("map", "cat /made-for-the-test", options=["--image", path])
    assert (ran.rc, ran.out) == (0, b"yes\n"), ran
    assert ran.record("start")["nodewrap"]["image"]["digest"] == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # all but ctime is as before
    refused(boxed.sh("map", "true", options=["--image", path]), 203, "NW-IMAGE-CHANGED", "policy apply")
    path.unlink()


def test_secret_of_the_pilots_in_the_image_is_refused(boxed, images, home):
    inside = {"X509_USER_PROXY": f"{images}/directory/etc/proxy"}
    ran = boxed.sh("map", "true", options=["--image", images / "directory"], env=inside)
    refused(ran, 201, "NW-WORKDIR-SECRET", "etc/proxy")


# ---- the runtime ----


def test_pilots_words_for_the_runtime_reach_neither_it_nor_the_payload(boxed, images):
    policy(boxed, [f"{images}/*"], 'env = { keep = ["APPTAINER*", "SINGULARITY*", "KEPT"] }')
    pilots = {"APPTAINER_BIND": "/usr:/mnt", "APPTAINERENV_EVIL": "1", "SINGULARITYENV_EVIL": "1", "SINGULARITY_BINDPATH": "/usr:/mnt", "KEPT": "1"}
    ran = boxed.sh("map", "env; ls /mnt", options=["--image", images / "directory"], env=pilots)
    assert b"KEPT=1" in ran.out, ran
    assert not re.search(rb"EVIL|/usr:/mnt", ran.out), ran.text
    refused(boxed.sh("map", "true", options=["--image", images / "directory", "--env", "APPTAINERENV_LD_PRELOAD=/x"]), 201, "NW-IMAGE", "--env")


def broken(tmp):
    (tmp / "interpreter").write_text("#!/not/there\n")
    (tmp / "interpreter").chmod(0o755)
    (tmp / "plain").write_text("")
    return {"missing": "is not there", "plain": "cannot be executed", "interpreter": "cannot execute"}


def test_missing_or_broken_runtime_is_an_internal_error_with_the_reason_and_never_a_run_outside(setuid_node, images, session):
    tmp = session.top / "runtimes"
    tmp.mkdir()
    for name, says in broken(tmp).items():
        text = setuid_node.policy_text().replace('"batch", "strict"]\n', f'"batch", "strict"]\nimage = ["{images}/*"]\n')
        text = text.replace("[limits]", f'on_internal_error = "log-only"\n\n[apptainer]\nprogram = "{tmp / name}"\n\n[limits]')
        setuid_node.site.policy(text + f'\n[profile.batch]\nadd = {{ read_only = ["{tmp}"] }}\n')
        ran = setuid_node.sh("static", "touch /tmp/ran-outside", options=["--image", images / "directory"])
        assert (ran.rc, ran.out) == (202, b""), ran
        assert ran.err.startswith(b"nodewrap: NW-APPTAINER: "), ran
        assert says.encode() in ran.err
        assert "start" not in [record["event"]["action"] for record in ran.records] or "exit" in [r["event"]["action"] for r in ran.records]
    shutil.rmtree(tmp)


def findings(node):
    """What doctor, called by the site's administrator, finds of the runtime: {check: finding}."""
    ran = subprocess.run([node.site.binary, "doctor", "--json"], capture_output=True, check=False, timeout=60, env=node.site.environment(node.pilot),
                         cwd="/", **node.site.owner())
    return json.loads(ran.stdout)["checks"]


def test_doctor_makes_a_container_and_tells_what_is_broken(boxed, session):
    found = findings(boxed)
    assert found["apptainer"]["yes"] is True, found
    assert "a container was made" in found["apptainer"]["saw"]
    assert re.search(r"apptainer version \d", found["apptainer"]["saw"])
    assert found["apptainer.sif"]["yes"] is True
    fake = session.top / "fake-apptainer"
    for code in (255, 0):  # 0: what is not nodewrap's to know from the exit code alone
        fake.write_text(f"#!/bin/sh\ntest $1 = --version && echo apptainer version 0 || {{ echo FATAL: no luck >&2; exit {code}; }}\n")
        fake.chmod(0o755)
        policy(boxed, ["/x"], f'apptainer = {{ program = "{fake}" }}')
        found = findings(boxed)["apptainer"]
        assert (found["yes"], "FATAL: no luck" in found["saw"], bool(found["next"])) == (False, True, True)
    fake.unlink()

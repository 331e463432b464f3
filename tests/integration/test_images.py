"""Images that the policy names, under the real launcher and its locked policy child, on nodes with and without Apptainer."""

from __future__ import annotations

import hashlib
import os


def test_locked_policy_child_knows_a_named_image_again_and_tells_when_it_has_changed(node, session):
    path = session.top / "named.sif"
    path.write_bytes(b"#!/usr/bin/env run-singularity\n\0" + b"SIF_MAGIC\0" + bytes(1 << 20))
    try:
        text = node.policy_text().replace('"batch", "strict"]\n', f'"batch", "strict"]\nimage = ["{path}"]\n')
        node.site.policy(f'{text}\n[apptainer]\nprogram = "/bin/true"\n')
        ran = node.run("log-only", "true", options=["--image", str(path)])
        assert ran.record("start")["nodewrap"]["image"]["digest"] == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest(), ran
        before = path.stat()
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        ran = node.run("log-only", "true", options=["--image", str(path)])
        assert (ran.rc, ran.err.split()[1]) == (203, b"NW-IMAGE-CHANGED:"), ran
    finally:
        path.unlink()
        node.open_policy()

#!/bin/sh
# node.sh TREE CHECKOUT: makes the distribution in TREE a node of a site, by what README tells an administrator to do. In a mount namespace of its own.
set -eu
tree=$1 checkout=$2

mount -t proc proc "$tree/proc"
mount -t sysfs sys "$tree/sys"
mount --bind /dev "$tree/dev"
mount -t cgroup2 cgroup2 "$tree/sys/fs/cgroup" # systemd will have it there: the first guard writes down where it is
echo node.example.org >"$tree/etc/hostname"
printf '127.0.0.1 localhost node.example.org\n' >"$tree/etc/hosts"
echo 'kernel.yama.ptrace_scope = 1' >"$tree/etc/sysctl.d/10-yama.conf"
echo 'net.ipv4.ip_forward = 1' >"$tree/etc/sysctl.d/10-forward.conf" # private networks with a way out, docs/network.md

exec chroot "$tree" /bin/sh -eu -s -- "$checkout" <<'SITE'
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
cd "$1"
make -s install
groupadd -g 40000 gridusers
for number in 1 2 3; do useradd -u 4000$number -g gridusers -m -s /bin/sh griduser$number; done
useradd -u 2000 -U -G nodewrap-callers -m -s /bin/sh gridpilot
cat >>/etc/nodewrap/guard <<'GUARD'
policyd /run/nodewrap/policyd
netd /run/nodewrap/netd
network 10.200.0.0/24
switch-uid 40001-40999
switch-gid 40000-40999
map-uid 1000000000-1000065535
allow switch strict batch compat outside
allow map strict batch compat
allow log-only strict batch compat
GUARD
cat >/etc/nodewrap/nodewrap.toml <<'POLICY'
[site]
name = "EXAMPLE-T2"
contact = "grid-admins@example.org"
multi_user = "yes"
modes = { switch = "allow", map = "allow", log-only = "allow" }
minimum_assurance = "declared"

[[caller]]
account = "gridpilot"
vo = "example"

[pool.users]
accounts = ["griduser[1-3]"]

[profile.outside]
like = "strict"
network = "private"

[[rule]]
name = "outside"
when = { vo = "example", dn = "/CN=outside" }
identity = { mode = "switch", pool = "users", lease = "exclusive" }
profile = "outside"

[[rule]]
name = "all"
when = { vo = "example" }
identity = [{ mode = "switch", pool = "users", lease = "exclusive" }, { mode = "map" }, { mode = "log-only" }]
profile = ["compat", "batch", "strict"]
POLICY
nodewrap policy apply
cp /usr/local/libexec/nodewrap/nodewrap-*.service /usr/local/libexec/nodewrap/nodewrap-*.timer /etc/systemd/system/
cp tests/kernel/lane.service /etc/systemd/system/
systemctl -q enable nodewrap-policyd.service nodewrap-netd.service nodewrap-sweep.timer lane.service
systemctl -q mask serial-getty@ttyS0.service serial-getty@ttyS1.service getty@tty1.service
# What pytest works on, made here, where that takes seconds and not minutes.
build/venv/bin/python -c '
import pickle, pathlib
from tests.site import Session
session = Session()
for launcher in ("setuid", "userns"):
    session.site(launcher)
session.keep()
pathlib.Path("/root/session").write_bytes(pickle.dumps(session))'
SITE

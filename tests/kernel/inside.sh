#!/bin/sh
# Pid 1 of the virtual machine, in the host's file system (read-only below, memory above): a node with cgroup v2 and every controller.
# boot.py sets CHECKOUT, MODULES and CGROUP and gives the command's words. The exit status goes out by the second serial port.
set -u
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mkdir -p /dev/pts /dev/shm
mount -t devpts -o mode=620,ptmxmode=666 pts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
# Where the installations' guards say, which were made outside; with nsdelegate, as systemd mounts it.
[ "$CGROUP" = /sys/fs/cgroup ] || mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup
mkdir -p "$CGROUP"
mount -t cgroup2 -o nsdelegate cgroup2 "$CGROUP"
ln -sf /usr/bin/busybox /run/modprobe # what the kernel asks for its modules
echo /run/modprobe >/proc/sys/kernel/modprobe
mkdir -p /lib/modules
ln -sfn "$MODULES" "/lib/modules/$(uname -r)"
ip link set lo up 2>/dev/null || busybox ip link set lo up
hostname nwvm 2>/dev/null || busybox hostname nwvm
cd "$CHECKOUT" && "$@" </dev/null
echo "$?" >/dev/ttyS1
busybox sync
busybox poweroff -f

#!/bin/sh
# On the booted node, by lane.service: says what the node is, runs what was asked for, and switches it off. The exit status goes out by the second serial port.
set -u
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 TERM=dumb NODEWRAP_TEST_SESSION=/root/session
export NODEWRAP_TEST_SLOWNESS=8 # an emulated processor
cd "$CHECKOUT" || exit 1

check() { # WHAT COMMAND…: a node that is not what the lane is for would test nothing
    what=$1
    shift
    if "$@" >/run/lane.out 2>&1; then echo "node: $what"; else
        echo "node: NOT: $what"
        cat /run/lane.out
        failed=1
    fi
}

failed=0
eval "set -- $WORDS"
how=$1
shift
echo "node: Linux $(uname -r), systemd $(systemctl --version | sed -n '1s/systemd \([0-9]*\).*/\1/p')"
check 'AppArmor' grep -q Y /sys/module/apparmor/parameters/enabled
check 'Yama' grep -q 1 /proc/sys/kernel/yama/ptrace_scope
for name in memory pids cpu io; do check "cgroup v2 with $name" grep -qw "$name" /sys/fs/cgroup/cgroup.controllers; done
check 'the resident policy child' systemctl is-active nodewrap-policyd.service
check 'the keeper of private networks' systemctl is-active nodewrap-netd.service
check 'the sweeping timer' systemctl is-active nodewrap-sweep.timer
run() { # SUBJECT WORD…: as the pilot
    subject=$1
    shift
    setpriv --reuid gridpilot --regid gridpilot --init-groups -- nodewrap run --declare vo=example --declare "subject=$subject" "$@"
}
check 'a payload of the pilot, by the site policy' run /CN=user --profile strict -- /bin/true
check 'a payload with a private network' run /CN=outside -- \
    /usr/bin/python3 -c 'import socket; socket.socket(type=socket.SOCK_DGRAM).connect(("192.0.2.1", 9))' # ENETUNREACH with a loopback alone
nodewrap doctor

case $how in
escape) timeout "$SECONDS_AT_MOST" nodewrap escape-test --caller gridpilot --declare vo=example --declare subject=/CN=user "$@" ;;
tests) timeout "$SECONDS_AT_MOST" build/venv/bin/python -m pytest -p no:cacheprovider "$@" ;;
command) timeout "$SECONDS_AT_MOST" "$@" ;;
esac
status=$?
[ "$failed" = 0 ] || [ "$status" -ne 0 ] || status=1
echo "$status" >/dev/ttyS1
systemctl poweroff --force

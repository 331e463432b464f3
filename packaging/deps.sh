#!/bin/sh
# Install what is missing, as root; else say what is missing and the command that installs it.
#
# Exit 0 when what `make build` needs is there afterwards; 1 when it is not. What only tests, the demo or man pages need is named, but ends nothing:
# those say themselves what they leave out.
set -eu

say() { printf '%s\n' "$*"; }

if command -v apt-get >/dev/null; then
    build='gcc make libc6-dev libcap-dev libffi-dev libseccomp2 python3-venv python3-dev'
    more='musl-tools voms-clients lcmaps-plugins-verify-proxy uidmap openssl bubblewrap cppcheck clang-tidy clang libclang-rt-dev pandoc acl attr busybox-static squashfs-tools squashfuse nftables iproute2 passt
          firejail sudo unhide stress-ng debsums'
    has() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q '^install ok installed'; }
    install='apt-get install -y --no-install-recommends'
    refresh='apt-get update -q'
elif command -v dnf >/dev/null; then
    # EL: pandoc and cppcheck come from CRB and EPEL, voms-clients-cpp from EPEL; glibc-static and the headers from CRB.
    build='gcc make glibc-devel libcap-devel libffi-devel libseccomp python3-devel'
    more='glibc-static voms-clients-cpp lcmaps-plugins-verify-proxy shadow-utils openssl bubblewrap cppcheck clang compiler-rt clang-tools-extra pandoc acl attr busybox squashfs-tools squashfuse apptainer nftables iproute passt'
    has() { rpm -q --quiet "$1" || rpm -q --quiet --whatprovides "$1"; }
    install='dnf install -y'
    refresh=:
    rpm -q --quiet epel-release || say "note: $(printf '%s' 'voms-clients-cpp, pandoc and cppcheck need EPEL and CRB: dnf install epel-release && crb enable')"
else
    say 'neither apt-get nor dnf here: a C compiler, make, libcap headers, libseccomp and Python >= 3.9 with venv and headers are yours to provide' >&2
    exit 0
fi

missing() { # PACKAGE…
    for package in "$@"; do has "$package" || printf ' %s' "$package"; done
}

# shellcheck disable=SC2086  # lists of words
install_all() { # required|optional PACKAGE…
    kind=$1
    shift
    [ $# -gt 0 ] || return 0
    if [ "$(id -u)" -ne 0 ]; then
        say "missing ($kind):$(printf ' %s' "$@"); as root: $install $*"
        [ "$kind" = optional ]
        return
    fi
    say "installing ($kind): $*"
    [ -n "$refreshed" ] || { $refresh && refreshed=yes; }
    [ "$kind" = required ] || { install_each "$@"; return; }
    $install "$@"
}

# One by one: a repository that lacks one of them still gives the others.
# shellcheck disable=SC2086
install_each() {
    for package in "$@"; do
        $install "$package" || say "cannot install $package (optional): the tests that use it will say so"
    done
}

refreshed=
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086,SC2046
install_all required $(missing $build)
# shellcheck disable=SC2086,SC2046
install_all optional $(missing $more)
# Debian before trixie has no apptainer: the tests' own, unpacked below build/.
if command -v apt-get >/dev/null && ! command -v apptainer >/dev/null; then
    packaging/apptainer.sh build/apptainer || say 'no apptainer (optional): the tests that use it will say so'
fi
say 'dependencies: done'

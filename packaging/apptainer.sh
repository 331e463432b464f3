#!/bin/sh
# A real Apptainer for the tests, in a directory of its own: apptainer.sh DIR
#
# Nothing is installed and nobody needs to be root. On Debian before trixie there is no package of it: the one of Debian unstable is unpacked, together
# with the C library that it was linked to, and its interpreter set to that (patchelf, as a package or unpacked as well). The mirror is the one that
# this machine's apt already uses, by its own keys. On EL: dnf install apptainer (EPEL); then this script has nothing to do.
set -eu

dir=$(realpath -m "${1:?usage: apptainer.sh DIR}")
if "$dir/usr/bin/apptainer" --version >/dev/null 2>&1; then exit 0; fi # a checkout that was moved has one that does not start
command -v apt-get >/dev/null || { echo 'no apt-get here: install apptainer from EPEL, or the release of its project' >&2; exit 1; }
# shellcheck disable=SC2016  # apt's own placeholders
mirror=$(apt-get indextargets --format '$(SITE) $(RELEASE)' 'Created-By: Packages' | awk '$1 ~ /\/debian$/ { print $1; exit }')
key=/usr/share/keyrings/debian-archive-keyring.gpg
[ -n "$mirror" ] && [ -e "$key" ] || { echo 'this apt has no Debian mirror: install apptainer by hand' >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/state" "$work/debs" "$work/tree"
: >"$work/status"
echo "deb [signed-by=$key] $mirror unstable main" >"$work/sources.list"
cat >"$work/apt.conf" <<END
Dir::Etc::sourcelist "$work/sources.list";
Dir::Etc::sourceparts "-";
Dir::State "$work/state";
Dir::State::lists "$work/lists";
Dir::State::status "$work/status";
Dir::Cache "$work/cache";
APT::Sandbox::User "";
Acquire::Languages "none";
# The clock of a build machine may be ahead of a mirror that is a snapshot.
Acquire::Check-Valid-Until "false";
END
command -v patchelf >/dev/null || { (cd "$work" && apt-get -o APT::Sandbox::User= download -qq patchelf && dpkg-deb -x patchelf_*.deb "$work/tool"); PATH=$PATH:$work/tool/usr/bin; }
export APT_CONFIG="$work/apt.conf"
apt-get update -qq
(cd "$work/debs" && apt-get download -qq apptainer libc6 libseccomp2 libsqlite3-0)
for one in "$work"/debs/*.deb; do dpkg-deb -x "$one" "$work/tree"; done
lib=$(dirname "$(find "$work/tree/usr/lib" -name libc.so.6)")
at=$dir/${lib#"$work/tree/"}
for one in "$work/tree/usr/bin/apptainer" "$lib/apptainer/bin/starter"; do # force-rpath: also for what its libraries need
    patchelf --set-interpreter "$at/$(basename "$lib"/ld-linux*)" --force-rpath --set-rpath "$at" "$one"
done
# Debian's multiarch libexec gives it two prefixes.
ln -sfn ../etc "$work/tree/usr/etc"
ln -sfn ../../etc "$work/tree/usr/lib/etc"
mkdir -p "$work/tree/usr/var/lib/apptainer/mnt/session"
ln -sfn ../var "$work/tree/usr/lib/var"
chmod -R go-w,a+rX "$work/tree"
mkdir -p "$(dirname "$dir")"
rm -rf "$dir.new"
mv "$work/tree" "$dir.new"
chmod 755 "$dir.new"
mv "$dir.new" "$dir"
"$dir/usr/bin/apptainer" --version

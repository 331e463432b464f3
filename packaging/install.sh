#!/bin/sh
# Usage (by make): install.sh install|uninstall, all settings from the environment (see INSTALL_ENV in the Makefile).
#
# With LAUNCHER=setuid (root): both launchers, the setuid one 4750 root:$CALLERS, and the service account. With LAUNCHER=userns: that launcher alone, no account.
# Under DESTDIR no account is made and no mode is set that needs one: what the package must do is printed instead.
# Directories and accounts that did not exist before are noted in $SYSCONFDIR/nodewrap/made, so that uninstall takes back just those.
set -eu
umask 022

say() { printf '%s\n' "$*"; }
die() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

is_root() { [ "$(id -u)" -eq 0 ]; }
staged() { [ -n "$DESTDIR" ]; }
# Accounts and owners are set only on a live system, by root.
live_root() { is_root && ! staged; }

conf=$SYSCONFDIR/nodewrap
made=$DESTDIR$conf/made

# ---- install ----

# dir PATH [MODE]: with its parents; what had to be made is noted, innermost last.
dir() {
    [ -d "$DESTDIR$1" ] || {
        [ "$1" = / ] || dir "$(dirname "$1")"
        mkdir "$DESTDIR$1"
        fresh="$fresh $1"
    }
    [ -z "${2-}" ] || chmod "$2" "$DESTDIR$1"
}

# Copied aside and renamed: a program that is running keeps its old file, and nobody meets half of the new one.
put() { # MODE SOURCE TARGET
    cp "$2" "$DESTDIR$3.new"
    chmod "$1" "$DESTDIR$3.new"
    mv -f "$DESTDIR$3.new" "$DESTDIR$3"
}

# put_config SOURCE TARGET: an edited file stays, the new one goes beside it.
put_config() {
    if [ -e "$DESTDIR$2" ] && ! cmp -s "$1" "$DESTDIR$2"; then
        put 0644 "$1" "$2.dist"
        say "kept your $2; the shipped one is $2.dist"
    else
        put 0644 "$1" "$2"
    fi
}

# fill TEMPLATE TARGET MODE: @NAME@ replaced by the setting of that name.
fill() {
    sed -e "s|@PYTHON@|$PYTHON|g" -e "s|@SITE@|$site|g" -e "s|@SYSCONFDIR@|$conf|g" -e "s|@STATEDIR@|$STATEDIR|g" -e "s|@LOGDIR@|$LOGDIR|g" \
        -e "s|@RUNDIR@|$RUNDIR|g" -e "s|@LIBEXEC@|$LIBEXEC|g" -e "s|@LAUNCHER@|$LAUNCHER|g" -e "s|@SERVICE_USER@|$SERVICE_USER|g" \
        -e "s|@CALLERS@|$CALLERS|g" -e "s|@LIB@|$LIB|g" "$1" >"$OBJDIR/filled"
    put "$3" "$OBJDIR/filled" "$2"
}

make_accounts() {
    getent group "$CALLERS" >/dev/null || { groupadd -r "$CALLERS" && say "group $CALLERS" >>"$made"; }
    getent passwd "$SERVICE_USER" >/dev/null || {
        useradd -r -U -M -d / -s /usr/sbin/nologin -c 'nodewrap policy child' "$SERVICE_USER"
        say "user $SERVICE_USER" >>"$made"
    }
}

install_setuid() {
    put 0750 "$OBJDIR/nodewrap-setuid" "$LIBEXEC/nodewrap-setuid"
    staged && return
    chown "root:$CALLERS" "$LIBEXEC/nodewrap-setuid" # before chmod: chown clears the setuid bit
    chmod 4750 "$LIBEXEC/nodewrap-setuid"
}

install_launchers() {
    dir "$LIBEXEC"
    dir "$PREFIX/bin"
    put 0755 "$OBJDIR/nodewrap-userns" "$LIBEXEC/nodewrap-userns"
    put 0755 "$OBJDIR/nodewrap-sweep" "$LIBEXEC/nodewrap-sweep"
    put 0755 "$OBJDIR/nodewrap-inside" "$LIBEXEC/nodewrap-inside"
    rm -f "$DESTDIR$LIBEXEC/nodewrap-setuid" # a site that changed to userns must not keep it
    [ "$LAUNCHER" != setuid ] || install_setuid
    put 0755 "$OBJDIR/nodewrap" "$PREFIX/bin/nodewrap"
    ln -sfn nodewrap "$DESTDIR$PREFIX/bin/glexec" # a drop-in by name
    fill packaging/mkgltempdir.in "$PREFIX/bin/mkgltempdir" 0755
}

# The new environment is made beside the old one and renamed: its files name each other by the final path, which python -m venv does not need.
install_python() {
    dir "$LIB"
    new=$DESTDIR$LIB/venv.new
    rm -rf "$new"
    "$PYTHON" -m venv --without-pip "$new"
    "$VPY" -m pip install -q --no-index --find-links "$WHEELS" --no-compile --target "$DESTDIR$LIB/venv.new/lib/$pyname/site-packages" nodewrap
    fill packaging/paths.py.in "$LIB/venv.new/lib/$pyname/site-packages/nodewrap/_paths.py" 0644
    # unchecked-hash: the .pyc is used without a look at the source's time stamp, and no run of root's ever rewrites one.
    "$PYTHON" -m compileall -q --invalidation-mode unchecked-hash -s "$new" -p "$LIB/venv" "$new/lib/$pyname/site-packages"
    rm -rf "$new"/bin/[Aa]ctivate* "$new/lib/$pyname/site-packages/bin" # scripts of the libraries, which nobody calls
    sed -i "s|$DESTDIR$LIB/venv\.new|$LIB/venv|g" "$new/pyvenv.cfg"
    rm -rf "$DESTDIR$LIB/venv.old"
    [ ! -d "$DESTDIR$LIB/venv" ] || mv "$DESTDIR$LIB/venv" "$DESTDIR$LIB/venv.old"
    mv "$new" "$DESTDIR$LIB/venv"
    rm -rf "$DESTDIR$LIB/venv.old"
    fill packaging/serve.py.in "$LIBEXEC/serve.py" 0644
    for unit in nodewrap-policyd.service nodewrap-netd.service nodewrap-sweep.service nodewrap-sweep.timer; do
        fill "packaging/$unit.in" "$LIBEXEC/$unit" 0644
    done
    fill packaging/epilogue.in "$LIBEXEC/epilogue" 0755
}

install_config() {
    dir "$conf/policy.d"
    dir "$conf/examples"
    for file in policies/*.toml; do
        put 0644 "$file" "$conf/examples/$(basename "$file")"
    done
    # The site's policy as shipped refuses everybody; without privilege there is nobody to refuse but oneself.
    if [ "$LAUNCHER" = userns ]; then main=userns; else main=nodewrap; fi
    put_config "policies/$main.toml" "$conf/nodewrap.toml"
    put_config policies/profiles.toml "$conf/profiles.toml"
}

install_state() {
    dir "$STATEDIR" 0755
    dir "$STATEDIR/leases" 0700 # who runs what is nobody's business
    dir "$STATEDIR/policy" 0755 # the policy child reads it under its own uid
    dir "$LOGDIR" 0750
    if live_root && getent group adm >/dev/null; then # adm reads logs, on Debian and EL alike
        chgrp adm "$LOGDIR"
    fi
}

install_man() {
    for page in $MANPAGES; do
        dir "$MANDIR/man${page##*.}"
        put 0644 "$page" "$MANDIR/man${page##*.}/${page##*/}"
    done
}

# The first guard is the tightest that works; the admin widens it. One that is there is the admin's.
install_guard() {
    fill packaging/first-guard.in "$LIBEXEC/first-guard" 0755
    if [ -e "$DESTDIR$conf/guard" ]; then
        say "kept your $conf/guard"
    elif ! staged; then
        "$LIBEXEC/first-guard" >"$OBJDIR/guard"
        put 0644 "$OBJDIR/guard" "$conf/guard"
    fi
}

# Without an applied policy a call would be an error of the site's; with the shipped one it is an answer. Later edits are the admin's to apply.
apply_policy() {
    staged || [ -e "$STATEDIR/policy/current" ] || "$PREFIX/bin/nodewrap" policy apply
}

note_made() {
    for path in $fresh; do say "dir $path"; done >>"$made"
}

packager_notes() {
    cat <<NOTES
staged below $DESTDIR. The package itself must, on the node:
  groupadd -r $CALLERS; useradd -r -U -M -d / -s /usr/sbin/nologin $SERVICE_USER
  chown root:$CALLERS $LIBEXEC/nodewrap-setuid && chmod 4750 $LIBEXEC/nodewrap-setuid
  chmod 0750 $LOGDIR; chmod 0700 $STATEDIR/leases
  [ -e $conf/guard ] || $LIBEXEC/first-guard >$conf/guard; $PREFIX/bin/nodewrap policy apply
NOTES
}

do_install() {
    fresh=
    pyname=python$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    site=$LIB/venv/lib/$pyname/site-packages
    [ "$LAUNCHER" != setuid ] || is_root || die "the setuid launcher needs root to install: run make install as root, or with LAUNCHER=userns"
    dir "$conf"
    if live_root && [ "$LAUNCHER" = setuid ]; then make_accounts; fi
    install_launchers
    install_python
    install_config
    install_state
    install_man
    note_made
    install_guard
    apply_policy
    if staged && [ "$LAUNCHER" = setuid ]; then packager_notes; fi
    say "installed below $DESTDIR$PREFIX, launcher $LAUNCHER; next: $PREFIX/bin/nodewrap doctor"
}

# ---- uninstall ----

# Innermost first; a directory that holds something else stays.
remove_dirs() {
    printf '%s\n' "$noted" | sed -n 's/^dir //p' | sort -r | while read -r path; do
        [ ! -d "$DESTDIR$path" ] || [ -n "$(ls -A "$DESTDIR$path")" ] || rmdir "$DESTDIR$path"
    done
}

remove_accounts() {
    printf '%s\n' "$noted" | while read -r kind name; do
        case $kind in
        user) userdel "$name" ;;
        group) groupdel "$name" ;;
        esac
    done
}

remove_programs() {
    for page in docs/man/*.md; do
        page=$(basename "$page" .md)
        rm -f "$DESTDIR$MANDIR/man${page##*.}/$page"
    done
    for name in nodewrap glexec mkgltempdir; do rm -f "$DESTDIR$PREFIX/bin/$name"; done
    rm -rf "$DESTDIR${LIBEXEC:?}" "$DESTDIR${LIB:?}" "$DESTDIR${RUNDIR:?}"
}

do_uninstall() {
    noted=$(cat "$made" 2>/dev/null || true)
    remove_programs
    if [ -n "$PURGE" ]; then
        if live_root; then remove_accounts; fi
        rm -rf "$DESTDIR${conf:?}" "$DESTDIR${STATEDIR:?}" "$DESTDIR${LOGDIR:?}"
    else
        noted=$(printf '%s\n' "$noted" | grep -v -e " $STATEDIR" -e " $LOGDIR" -e " $conf" || true)
        say "kept $conf, $STATEDIR and $LOGDIR: make uninstall PURGE=1 removes them and the accounts"
    fi
    remove_dirs
}

for word in "$DESTDIR" "$PREFIX" "$SYSCONFDIR" "$STATEDIR" "$LOGDIR" "$RUNDIR" "$MANDIR"; do
    case $word in
    *[!A-Za-z0-9_./+,:@%=-]*) die "the path '$word' has a character that the guard file and make cannot carry; use letters, digits and _./+,:@%=-" ;;
    esac
done
case $1 in
install) do_install ;;
uninstall) do_uninstall ;;
*) die "install or uninstall, not '$1'" ;;
esac

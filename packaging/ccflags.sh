#!/bin/sh
# Usage: ccflags.sh cflags|ldflags CC…
# Prints the hardening options that this compiler and libc know. Each is tried: an option that is not known is left out, not an error.
set -u

what=$1
shift
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
printf '#include <stdio.h>\nint main(void) { return puts("x") < 0; }\n' >"$tmp/t.c"

# shellcheck disable=SC2086  # a compiler and its options
try() { # OPTION…: printed when a program compiled and linked with it runs
    $cc -O2 -Werror "$@" -o "$tmp/t" "$tmp/t.c" >/dev/null 2>&1 && "$tmp/t" >/dev/null && printf '%s ' "$@"
}

cc=$*
case $what in
cflags)
    for option in -fstack-protector-strong -fstack-clash-protection -fcf-protection -fPIE -ffunction-sections -fno-strict-aliasing; do
        try "$option"
    done
    # The distribution's own level is replaced, not redefined; 3 needs GCC 12.
    try -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=3 || try -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2
    ;;
ldflags)
    # Static keeps ld.so, its environment and its search paths out of a setuid program, and saves 0.6 ms a start.
    try -static-pie || try -pie
    for option in -Wl,-z,relro -Wl,-z,now -Wl,-z,noexecstack -Wl,-z,nodlopen -Wl,--gc-sections -Wl,--as-needed; do
        try "$option"
    done
    ;;
*)
    echo "ccflags.sh: cflags or ldflags, not '$what'" >&2
    exit 2
    ;;
esac
exit 0

#!/bin/sh
# Usage: fuzz.sh SECONDS: each harness csrc/fuzz/fuzz_*.c with the pure core, under libFuzzer with ASan and UBSan, SECONDS each.
# A finding is kept in build/fuzz/ and ends the run.
set -eu
cd "$(dirname "$0")/.."

case ${1-} in '' | *[!0-9]*)
    echo 'fuzz.sh SECONDS' >&2
    exit 1
    ;;
esac
seconds=$1
command -v clang >/dev/null || {
    echo 'fuzz: clang is missing; make deps installs it' >&2
    exit 1
}
core=$(sed -n 's|^\([a-z_]*\.c\).*|csrc/\1|p' csrc/core.list)
for harness in csrc/fuzz/fuzz_*.c; do
    [ -e "$harness" ] || {
        echo 'fuzz: there is no harness csrc/fuzz/fuzz_*.c' >&2
        exit 1
    }
    name=$(basename "$harness" .c)
    mkdir -p "build/fuzz/$name"
    # shellcheck disable=SC2086  # a list of files
    clang -std=gnu11 -g -O1 -Icsrc -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -o "build/fuzz/$name.bin" "$harness" $core
    seeds=csrc/fuzz/seeds/${name#fuzz_}
    [ -d "$seeds" ] || seeds=
    # shellcheck disable=SC2086
    "build/fuzz/$name.bin" -max_len=65536 -max_total_time="$seconds" -artifact_prefix="build/fuzz/$name-" -print_final_stats=1 "build/fuzz/$name" $seeds
done

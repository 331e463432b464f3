#!/bin/sh
# Usage: asan.sh PYTHON: property and differential tests with nodewrap._core built under ASan and UBSan, from a copy of the checkout, so that the
# extension in the checkout stays the plain one.
set -eu
cd "$(dirname "$0")/.."

python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
copy=build/asan
rm -rf "$copy"
mkdir -p "$copy"
cp -r csrc nodewrap tests pyproject.toml setup.py policies docs "$copy"
rm -f "$copy"/nodewrap/_core.*
cd "$copy"
CFLAGS='-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer' "$python" -W ignore setup.py -q build_ext --inplace
# The interpreter itself is not instrumented: its allocator must be malloc for ASan to see a thing, and its leaks at exit are its own.
export PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0:abort_on_error=1
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" exec "$python" -m pytest -q tests/property tests/differential

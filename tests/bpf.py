"""Seccomp for tests: load a finished program into this process, and a classic-BPF interpreter that says what a program would answer.

Production loads filters in C; this loader exists so that a filter can be tried without the launcher.
"""

import ctypes
import os
import pickle
import platform
import signal
import struct

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, MODE_FILTER = 22, 38, 2
ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[platform.machine()]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def load(program):
    """Load the program (bytes) into this thread, for good. Raises OSError."""
    code = ctypes.create_string_buffer(program, len(program))
    header = _Program(len(program) // 8, ctypes.addressof(code))
    if _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or _libc.prctl(PR_SET_SECCOMP, MODE_FILTER, ctypes.addressof(header), 0, 0):
        raise OSError(ctypes.get_errno(), "cannot load the filter")


def call(number, *args):
    """The raw system call: its result, or minus errno. Arguments are ints (any 64 bits) or bytes (passed by address)."""
    ctypes.set_errno(0)
    words = [ctypes.c_char_p(arg) if isinstance(arg, bytes) else ctypes.c_ulong(arg & (1 << 64) - 1) for arg in args]
    result = _libc.syscall(ctypes.c_long(number), *words)
    return -ctypes.get_errno() if result == -1 else result


def in_child(work, *programs):
    """What ``work()`` returns in a forked child under the programs; an int below -1000 is minus 1000 minus the signal that ended the child."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(work, programs, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return -1000 - os.WTERMSIG(status)
    result, error = pickle.loads(data)
    if error:
        raise AssertionError(error)
    return result


def _child(work, programs, writing):
    signal.alarm(20)
    try:
        for program in programs:
            load(program)
        answer = (work(), None)
    except BaseException as wrong:
        answer = (None, repr(wrong))
    os.write(writing, pickle.dumps(answer))
    os._exit(0)


def answer(program, number, args=(), arch=AUDIT_ARCH):
    """The action (32 bits) that the kernel would take: an interpreter of what seccomp(2) programs may contain."""
    args = [arg & (1 << 64) - 1 for arg in (*args, *[0] * (6 - len(args)))]
    data = struct.pack("=IIQ6Q", number & 0xFFFFFFFF, arch, 0, *args)
    steps = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    accumulator, at = 0, 0
    while True:
        code, true, false, k = steps[at]
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif code == 0x54:
            accumulator &= k
        elif code == 0x05:
            at += k
        elif code == 0x06:
            return k
        else:
            at += true if _compare(code, accumulator, k) else false


def _compare(code, accumulator, k):
    tests = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}
    return tests[code]

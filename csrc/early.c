/* What musl must not find when it starts a set-user-id program (LAUNCHER_CC=packaging/musl-cc). Empty with glibc. */
#include <features.h>
#ifndef __GLIBC__
#include <stdint.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include "err.h"

typedef int start(int (*)(int, char **, char **), int, char **, void (*)(void), void (*)(void), void (*)(void));
start __real___libc_start_main, __wrap___libc_start_main; /* ld --wrap, given by the Makefile */

/* There is no thread pointer yet, so neither errno nor a stack protector: no function of the C library may be called. */
static inline long call(long number, long a, long b, long c, void *d) {
	register void *fourth __asm__("r10") = d;
	__asm__ volatile("syscall" : "+a"(number) : "D"(a), "S"(b), "d"(c), "r"(fourth) : "rcx", "r11", "memory");
	return number;
}

/* With AT_SECURE musl polls 0 to 2 (src/env/__libc_start_main.c), which the kernel refuses where fewer than 3 descriptors are allowed (poll(2)), and
 * then ends by a fault, without a word. Every other limit nwp_sanitise tells of. */
__attribute__((no_stack_protector)) int __wrap___libc_start_main(
	int (*main)(int, char **, char **), int argc, char **argv, void (*init)(void), void (*fini)(void), void (*ldso)(void)) {
	static const char text[] = "nodewrap: NW-LIMIT: RLIMIT_NOFILE (ulimit -n) is below 3, nodewrap needs 64 to record and clean up; raise it for the pilot\n";
	struct { uint64_t now, most; } files = { 3, 3 };
	call(SYS_prlimit64, 0, RLIMIT_NOFILE, 0, &files);
	if (files.now >= 3) return __real___libc_start_main(main, argc, argv, init, fini, ldso);
	call(SYS_write, 2, (long)text, sizeof text - 1, 0);
	return (int)call(SYS_exit_group, NW_USAGE, 0, 0, 0);
}
#endif

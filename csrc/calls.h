/* System calls for which the C library has no function: glibc before 2.36 (EL9 has 2.34), musl. Arguments as in their manual pages. */
#ifndef NW_CALLS_H
#define NW_CALLS_H

#include <sys/syscall.h>
#include <unistd.h>

#if __GLIBC__ > 2 || (__GLIBC__ == 2 && __GLIBC_MINOR__ >= 36)
#include <sys/mount.h>
#else
#include <linux/mount.h> /* an older sys/mount.h cannot be had together with it */
#define MNT_DETACH 2
int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data);
int umount2(const char *target, int flags);

static inline int fsopen(const char *type, unsigned flags) {
	return (int)syscall(SYS_fsopen, type, flags);
}

static inline int fsconfig(int fd, unsigned command, const char *key, const void *value, int aux) {
	return (int)syscall(SYS_fsconfig, fd, command, key, value, aux);
}

static inline int fsmount(int fd, unsigned flags, unsigned attributes) {
	return (int)syscall(SYS_fsmount, fd, flags, attributes);
}

static inline int open_tree(int dir, const char *path, unsigned flags) {
	return (int)syscall(SYS_open_tree, dir, path, flags);
}

static inline int move_mount(int from, const char *from_path, int to, const char *to_path, unsigned flags) {
	return (int)syscall(SYS_move_mount, from, from_path, to, to_path, flags);
}

static inline int mount_setattr(int dir, const char *path, unsigned flags, struct mount_attr *attributes, size_t size) {
	return (int)syscall(SYS_mount_setattr, dir, path, flags, attributes, size);
}
#endif

#ifndef SYS_quotactl_fd
#define SYS_quotactl_fd 443
#endif

#ifndef __GLIBC__
#include <sys/stat.h>
#define statx kernel_statx /* musl 1.2.5 has one, without the mount's number */
#define statx_timestamp kernel_statx_timestamp
#include <linux/stat.h>

static inline int statx(int dir, const char *path, int flags, unsigned mask, struct statx *told) {
	return (int)syscall(SYS_statx, dir, path, flags, mask, told);
}

static inline int close_range(unsigned first, unsigned last, int flags) {
	return (int)syscall(SYS_close_range, first, last, flags);
}
#endif

#endif

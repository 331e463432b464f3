/* Small wrappers without policy: time, descriptors, calls that libc lacks. */
#include "run.h"

/* Those too that C libraries keep for themselves: sigfillset(3) leaves them out. */
sigset_t nwp_all_signals(void) {
	sigset_t all;
	memset(&all, 0xff, sizeof all);
	return all;
}

/* CLOCK_BOOTTIME: limits go on while the machine is suspended and do not follow a stepped wall clock. */
uint64_t nwp_now_ms(void) {
	struct timespec t;
	clock_gettime(CLOCK_BOOTTIME, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

uint64_t nwp_realtime_us(void) {
	struct timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

void nwp_close(int *fd) {
	if (*fd >= 0) close(*fd);
	*fd = -1;
}

int nwp_write_all(int fd, const void *p, size_t n) {
	for (const char *s = p; n > 0;) {
		ssize_t w = write(fd, s, n);
		if (w < 0 && errno == EINTR) continue;
		if (w <= 0) return -1;
		s += w;
		n -= (size_t)w;
	}
	return 0;
}

/* One write() of a whole text, as the kernel's control files want it. */
int nwp_write_file(const char *path, const char *text) {
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	ssize_t w;
	if (fd < 0) return -1;
	w = write(fd, text, strlen(text));
	close(fd);
	return w == (ssize_t)strlen(text) ? 0 : -1;
}

static bool unprivileged;
uid_t nwp_unmapped;

/* What only the launcher without privilege may do, since its caller is all that it could harm. In a container most ids have no number, root's among
 * them, and show as one (user_namespaces(7)): what that one owns counts as root's. And a filter may know no openat2(2), our own for one. */
void nwp_unprivileged(void) {
	char map[64] = "", id[16] = "";
	int m = open("/proc/self/uid_map", O_RDONLY | O_CLOEXEC), o = open("/proc/sys/kernel/overflowuid", O_RDONLY | O_CLOEXEC);
	unsigned count = ~0u;
	unprivileged = true;
	if (m >= 0 && o >= 0 && read(m, map, sizeof map - 1) > 0 && read(o, id, sizeof id - 1) > 0 && sscanf(map, "%*u %*u %u", &count) == 1 && count != ~0u)
		nwp_unmapped = (uid_t)strtoul(id, NULL, 10);
	nwp_close(&m);
	nwp_close(&o);
}

/* Which mount it is on; 0: not to be told. */
uint64_t nwp_mount_of(int fd) {
	struct statx x = { 0 };
	return statx(fd, "", AT_EMPTY_PATH, STATX_MNT_ID, &x) == 0 && x.stx_mask & STATX_MNT_ID ? x.stx_mnt_id : 0;
}

int nwp_openat2(int dirfd, const char *path, uint64_t flags, uint64_t mode, uint64_t resolve) {
	struct open_how how = { .flags = flags | O_CLOEXEC, .mode = mode, .resolve = resolve };
	int fd = (int)syscall(SYS_openat2, dirfd, path, &how, sizeof how);
	bool beneath = resolve & RESOLVE_BENEATH;
	if (fd >= 0 || errno != ENOSYS || !unprivileged || !(flags & O_NOFOLLOW) || (beneath && (strchr(path, '/') || !strcmp(path, "..")))) return fd;
	fd = openat(dirfd, path, (int)flags | O_CLOEXEC, (mode_t)mode);
	if (fd >= 0 && resolve & RESOLVE_NO_XDEV && (!nwp_mount_of(fd) || nwp_mount_of(fd) != nwp_mount_of(dirfd))) {
		nwp_close(&fd);
		errno = EXDEV;
	}
	return fd;
}

/* The entries of an open directory, from the first; the descriptor stays. */
DIR *nwp_list(int dir) {
	int fd = fcntl(dir, F_DUPFD_CLOEXEC, 3);
	DIR *d = fd < 0 ? NULL : fdopendir(fd);
	if (d) rewinddir(d); /* the offset is shared */
	else nwp_close(&fd);
	return d;
}

/* The next entry; NULL at the end, and, with bad set, where it cannot be read: errno alone tells them apart (readdir(3)). */
struct dirent *nwp_entry(DIR *d, bool *bad) {
	errno = 0;
	struct dirent *x = readdir(d);
	if (!x && errno) *bad = true;
	return x;
}

/* The top of a kernel's file system that need not be mounted: root sees it all the same, the userns launcher only where it is. */
int nwp_open_fs(const struct nw_run *r, const char *type, const char *place) {
	if (!r->launcher->privileged) return open(place, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	int fs = fsopen(type, FSOPEN_CLOEXEC), bad = fs < 0 || fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0);
	int mnt = bad ? -1 : fsmount(fs, FSMOUNT_CLOEXEC, 0), dir = mnt < 0 ? -1 : openat(mnt, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	nwp_close(&fs);
	nwp_close(&mnt);
	return dir;
}

/* The end of a child of ours, after ms by our hand (-1: never); at once when it cannot be watched. Its wait status. A child that we may not kill
 * (an LSM's word) is not waited for: it goes with us. */
int nwp_wait(pid_t p, int ms) {
	struct pollfd end = { ms < 0 ? -1 : nwp_pidfd_open(p), POLLIN, 0 };
	int status = SIGKILL, how = 0; /* when it cannot be had, it was no success */
	if (ms >= 0 && (end.fd < 0 || poll(&end, 1, ms) != 1) && kill(p, SIGKILL)) how = WNOHANG;
	nwp_close(&end.fd);
	while (waitpid(p, &status, how) < 0 && errno == EINTR)
		;
	return status;
}

/* A new user namespace, alive in a child that does nothing and dies with us: its pid, or -1. */
pid_t nwp_hold_namespace(void) {
	pid_t us = getpid(), p = (pid_t)syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
	if (p) return p;
	while (prctl(PR_SET_PDEATHSIG, SIGKILL) == 0 && getppid() == us) pause();
	_exit(1);
}

int nwp_pidfd_open(pid_t pid) {
	return (int)syscall(SYS_pidfd_open, pid, 0);
}

/* What comes with a message, or goes with it: a descriptor, and of a receiver that asked for it (SO_PASSCRED) the sender's pid as we see it. */
union baggage {
	char b[CMSG_SPACE(sizeof(struct ucred)) + CMSG_SPACE(sizeof(int))];
	struct cmsghdr align;
};

ssize_t nwp_send_fd(int sock, const void *p, size_t n, int fd, int flags) {
	union baggage with = { { 0 } };
	struct iovec v = { (void *)(uintptr_t)p, n };
	struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1, .msg_control = with.b, .msg_controllen = CMSG_SPACE(sizeof fd) };
	if (fd < 0) return send(sock, p, n, flags | MSG_NOSIGNAL);
	with.align = (struct cmsghdr){ .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof fd) };
	memcpy(CMSG_DATA(&with.align), &fd, sizeof fd);
	return sendmsg(sock, &m, flags | MSG_NOSIGNAL);
}

/* *pid and *fd stay as they are where none came. */
ssize_t nwp_receive_fd(int sock, void *p, size_t n, int flags, pid_t *pid, int *fd) {
	union baggage with;
	struct iovec v = { p, n };
	struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1, .msg_control = with.b, .msg_controllen = sizeof with.b };
	ssize_t got = recvmsg(sock, &m, flags | MSG_CMSG_CLOEXEC);
	for (struct cmsghdr *c = got > 0 ? CMSG_FIRSTHDR(&m) : NULL; c; c = CMSG_NXTHDR(&m, c)) {
		if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_CREDENTIALS) memcpy(pid, CMSG_DATA(c), sizeof *pid); /* struct ucred begins with it */
		if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) memcpy(fd, CMSG_DATA(c), sizeof *fd);
	}
	return got;
}

/* Until then its number is its own, a zombie's too. */
bool nwp_is_reaped(int fd) {
	return nwp_pidfd_signal(fd, 0) && errno == ESRCH;
}

int nwp_pidfd_signal(int fd, int sig) {
	return (int)syscall(SYS_pidfd_send_signal, fd, sig, NULL, 0);
}

/* Going on with somebody's rights where another's are meant is not an option. */
void nwp_lost_ids(void) {
	struct nw_err e;
	nw_fail(&e, NW_INTERNAL, "NW-IDS", "cannot change to the caller's ids, or back: %s", strerror(errno));
	nwp_tell(&e);
	_exit(e.exit);
}

/* While the front reads and writes what the pilot gave us: the kernel asks at each read or write, not only at open, who is there (root's reserve of a
 * file system, set-id bits, files of /proc). The real id is the pilot's anyway, the saved one stays ours. */
void nwp_as_pilot(const struct nw_run *r, bool on) {
	uid_t uid = on ? r->caller.uid : 0;
	gid_t gid = on ? r->caller.gid : 0;
	if (!r->launcher->privileged) return;
	if (!on && setresuid((uid_t)-1, 0, (uid_t)-1)) nwp_lost_ids();
	if (setresgid((gid_t)-1, gid, (gid_t)-1) || setresuid((uid_t)-1, uid, (uid_t)-1)) nwp_lost_ids();
}

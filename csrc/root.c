/* The payload's view of files, built in a mount namespace of its own. Every source becomes a detached mount first, with its
 * flags already on (mount_setattr(2), Linux 5.12), then all are attached below a fresh tmpfs: no over-mount on /proc (I20), no
 * walk through names that the payload could have planted. */
#include "run.h"

#define HOME_SIZE (8ull << 30) /* as /tmp of the profile that has a home */

static int fail(struct nw_err *e, const char *what, const char *path) {
	return nw_fail(e, NW_INTERNAL, "NW-MOUNT", "%s %s: %s; see the profile in the policy, \"nodewrap doctor\"", what, path, strerror(errno));
}

static int set_flags(int fd, uint64_t set, uint64_t clear, uint64_t propagation, bool recursive) {
	struct mount_attr a = { .attr_set = set, .attr_clr = clear, .propagation = propagation };
	return mount_setattr(fd, "", AT_EMPTY_PATH | (recursive ? AT_RECURSIVE : 0), &a, sizeof a);
}

/* Private places, in which nobody but us has files yet: mounts, open until the payload's exec. */
static int own[NW_OPS], owns;

static bool is_own(int at) {
	uint64_t mount = nwp_mount_of(at);
	for (int i = 0; mount && i < owns; i++)
		if (nwp_mount_of(own[i]) == mount) return true;
	return false;
}

/* Walk to the place of path below root, making what is missing on our own file systems. On others nothing is made: what is missing there was there a
 * moment ago, and its owner, the pilot perhaps, has moved it. A link on the way is an attack or a mistake. */
static int target(int root, const char *path, bool dir, struct nw_err *e) {
	char part[NAME_MAX + 1];
	int at = dup(root), next;
	bool crossed = false;
	for (const char *p = path + strspn(path, "/"); *p && at >= 0; p += strspn(p, "/")) {
		size_t n = strcspn(p, "/");
		bool last = p[n + strspn(p + n, "/")] == 0;
		if (n > NAME_MAX) break;
		memcpy(part, p, n);
		part[n] = 0;
		p += n;
		next = nwp_openat2(at, part, O_PATH | O_NOFOLLOW, 0, RESOLVE_NO_XDEV);
		if (next < 0 && errno == EXDEV) {
			crossed = true;
			next = openat(at, part, O_PATH | O_NOFOLLOW | O_CLOEXEC);
		} else if (next < 0 && errno == ENOENT && (!crossed || is_own(at))) {
			int made = last && !dir ? mknodat(at, part, S_IFREG | 0444, 0) : mkdirat(at, part, 0755);
			next = made ? -1 : openat(at, part, O_PATH | O_NOFOLLOW | O_CLOEXEC);
		}
		close(at);
		at = next;
	}
	struct stat st;
	if (at < 0 || fstat(at, &st) || S_ISLNK(st.st_mode)) {
		nwp_close(&at);
		fail(e, "no place for", path);
	}
	return at;
}

static int place(int root, int mnt, const char *path, bool dir, struct nw_err *e) {
	int to, bad = -1;
	/* ENOENT: what is there has just been replaced, as the host's account files are by useradd(8). Then on the new one. */
	for (int again = 0; bad && again < 100 && (!again || errno == ENOENT); again++) {
		if ((to = target(root, path, dir, e)) < 0) return -1;
		bad = move_mount(mnt, "", to, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
		close(to); /* leaves errno alone: an O_PATH descriptor has nothing to flush */
	}
	return bad ? fail(e, "cannot attach", path) : 0;
}

static int attach(int root, int mnt, const char *path, bool dir, struct nw_err *e) {
	int bad = place(root, mnt, path, dir, e);
	close(mnt);
	return bad;
}

static int place_own(int root, int mnt, const char *path, struct nw_err *e) {
	own[owns++] = mnt;
	return place(root, mnt, path, true, e);
}

/* A new file system as a detached mount. options: name, value, …, NULL */
static int new_fs(const char *type, const char *const *options, uint64_t flags) {
	int fs = fsopen(type, FSOPEN_CLOEXEC), mnt = -1;
	if (fs < 0) return -1;
	for (; *options; options += 2)
		if (fsconfig(fs, FSCONFIG_SET_STRING, options[0], options[1], 0)) goto out;
	if (fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0) mnt = fsmount(fs, FSMOUNT_CLOEXEC, (unsigned)flags);
out:
	close(fs);
	return mnt;
}

/* A host path as a detached copy. Private unless later mounts of the host must follow (/cvmfs). -2: optional and absent. */
static int copy_host(const char *path, unsigned flags, bool slave, bool device, bool *dir, struct nw_err *e) {
	struct stat st;
	int mnt = open_tree(AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
	if (mnt < 0) return errno == ENOENT && flags & NW_OP_OPTIONAL ? -2 : fail(e, "cannot show", path);
	uint64_t set = MOUNT_ATTR_NOSUID | (device ? MOUNT_ATTR_NOEXEC : MOUNT_ATTR_NODEV) | (flags & NW_OP_RW ? 0 : MOUNT_ATTR_RDONLY);
	if (fstat(mnt, &st) || set_flags(mnt, set, 0, slave ? 0 : MS_PRIVATE, true)) {
		close(mnt);
		return fail(e, "cannot restrict", path);
	}
	if (device && !S_ISCHR(st.st_mode)) { /* a disk, or a directory of them, under a name that was another's when the policy was applied */
		close(mnt);
		return nw_fail(e, NW_INTERNAL, "NW-MOUNT", "%s: is no character device; see devices in the profile", path);
	}
	*dir = S_ISDIR(st.st_mode);
	return mnt;
}

static int do_tmpfs(int root, const char *path, unsigned mode, uint64_t size, const struct nw_account *owner, struct nw_err *e) {
	char m[16], s[32], uid[16], gid[16];
	const char *options[] = { "mode", m, "size", s, owner ? "uid" : NULL, uid, "gid", gid, NULL };
	int mnt;
	snprintf(m, sizeof m, "%o", mode);
	snprintf(s, sizeof s, "%llu", (unsigned long long)size);
	snprintf(uid, sizeof uid, "%u", owner ? owner->uid : 0);
	snprintf(gid, sizeof gid, "%u", owner ? owner->gid : 0);
	mnt = new_fs("tmpfs", options, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
	return mnt < 0 ? fail(e, "no tmpfs for", path) : place_own(root, mnt, path, e);
}

/* What every minimal /dev has beside its nodes: the links into /proc/self/fd, and terminals of its own. */
static int dev_base(int root, struct nw_err *e) {
	static const struct {
		const char *name, *to;
	} link[] = {
		{ "fd", "/proc/self/fd" },
		{ "stdin", "/proc/self/fd/0" },
		{ "stdout", "/proc/self/fd/1" },
		{ "stderr", "/proc/self/fd/2" },
		{ "ptmx", "pts/ptmx" },
	};
	static const char *const options[] = { "ptmxmode", "0666", "mode", "0620", NULL };
	int at = target(root, "/dev", true, e), mnt;
	for (size_t i = 0; at >= 0 && i < sizeof link / sizeof *link; i++)
		if (symlinkat(link[i].to, at, link[i].name)) {
			nwp_close(&at);
			return errno == EEXIST && i == 0 ? 0 : fail(e, "cannot link /dev", link[i].name); /* a /dev that another entry shows */
		}
	nwp_close(&at);
	mnt = new_fs("devpts", options, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);
	return mnt < 0 ? fail(e, "no devpts for", "/dev/pts") : attach(root, mnt, "/dev/pts", true, e);
}

static int one_dev(int root, const char *path, struct nw_err *e) {
	bool dir = false;
	int mnt = copy_host(path, NW_OP_RW | NW_OP_OPTIONAL, false, true, &dir, e);
	return mnt == -2 ? 0 : mnt < 0 ? -1 : attach(root, mnt, path, dir, e);
}

/* All character devices whose names begin so, as they are now: those of GPUs come when the driver is first used. */
static int do_devs(int root, const char *pattern, struct nw_err *e) {
	char path[NW_PATH + NAME_MAX + 8];
	int n = snprintf(path, sizeof path, "/dev/%s", pattern), at = (int)(strrchr(path, '/') - path) + 1, failed = 0;
	bool bad = false;
	struct stat st;
	path[at] = 0;
	DIR *d = opendir(path);
	if (!d) return errno == ENOENT ? 0 : fail(e, "cannot list", path);
	for (struct dirent *x; !failed && (x = nwp_entry(d, &bad));) {
		if (strncmp(x->d_name, pattern + at - 5, (size_t)(n - at - 1)) || fstatat(dirfd(d), x->d_name, &st, AT_SYMLINK_NOFOLLOW)) continue;
		snprintf(path + at, sizeof path - (size_t)at, "%s", x->d_name);
		failed = S_ISCHR(st.st_mode) ? one_dev(root, path, e) : 0;
	}
	if (bad) failed = fail(e, "cannot read", path);
	closedir(d);
	return failed;
}

static int do_dev(int root, const struct nw_op *op, struct nw_err *e) {
	static bool based;
	char path[NW_PATH + 8];
	if (!based && dev_base(root, e)) return -1;
	based = true;
	if (strchr(op->path, '*')) return do_devs(root, op->path, e);
	snprintf(path, sizeof path, "/dev/%s", op->path);
	return one_dev(root, path, e);
}

static int do_kernel_fs(int root, const char *type, const char *path, struct nw_err *e) {
	static const char *const none[] = { NULL };
	int mnt = new_fs(type, none, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
	return mnt < 0 ? fail(e, type, "cannot be mounted") : attach(root, mnt, path, true, e);
}

/* One file of accounts: the host's, with our line before or after its own. It keeps its name in the root: on a file without one nothing can be
 * mounted (DCACHE_CANT_MOUNT), as containers inside do. */
static int account_file(int root, const char *path, const char *name, const char *line, bool after, struct nw_err *e) {
	int fd = openat(root, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0444), from = open(path, O_RDONLY | O_CLOEXEC), mnt = -1;
	bool bad = fd < 0 || from < 0 || (!after && nwp_write_all(fd, line, strlen(line)));
	for (ssize_t n = 1; !bad && n > 0;) bad = (n = sendfile(fd, from, NULL, 1 << 20)) < 0;
	if (!bad && after) bad = nwp_write_all(fd, line, strlen(line)) != 0;
	if (!bad) mnt = open_tree(root, name, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
	bad = mnt < 0 || set_flags(mnt, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_RDONLY, 0, MS_PRIVATE, false);
	bad = bad ? fail(e, "cannot make", path) : attach(root, mnt, path, false, e);
	nwp_close(&from);
	nwp_close(&fd);
	return bad;
}

/* The payload finds itself by its uid, as who its environment says. Its line is the first of passwd(5): the host's entry of that number is
 * somebody else's in mode map, and elsewhere names a home that may not be shown. Of its group the host's name stays, where it has one. */
static int do_accounts(struct nw_run *r, int root, struct nw_err *e) {
	char **env = nwp_build_env(r), line[NW_PATH * 3];
	const char *name = env ? nwp_env(env, "USER") : NULL, *home = env ? nwp_env(env, "HOME") : NULL;
	if (!name || !*name || strlen(name) >= NW_PATH || name[strcspn(name, ":\n")]) name = "payload";
	if (!home || *home != '/' || strlen(home) >= NW_PATH || home[strcspn(home, ":\n")]) home = "/";
	snprintf(line, sizeof line, "%s:x:%u:%u::%s:/bin/sh\n", name, r->id.inside_uid, r->id.inside_gid, home);
	int bad = account_file(root, "/etc/passwd", ".passwd", line, false, e);
	bool after = r->decision.mode != NW_MAP;
	snprintf(line, sizeof line, "%s%s:x:%u:\n", after ? "\n" : "", name, r->id.inside_gid);
	bad = bad || account_file(root, "/etc/group", ".group", line, after, e);
	free(env);
	return bad;
}

static int do_op(struct nw_run *r, int root, const struct nw_op *op, struct nw_err *e) {
	char path[sizeof r->disk + 16];
	const char *home;
	struct stat st;
	bool dir = false;
	int mnt, at;
	switch (op->kind) {
	case NW_DISK:
		snprintf(path, sizeof path, "%s/%d", r->disk, (int)(op - r->profile.op));
		mnt = copy_host(path, NW_OP_RW, false, false, &dir, e);
		return mnt < 0 ? -1 : place_own(root, mnt, op->path, e);
	case NW_TMPFS: return do_tmpfs(root, op->path, op->mode, nwp_scratch(r, op->size), NULL, e);
	case NW_DEV: return do_dev(root, op, e);
	case NW_PROC: return do_kernel_fs(root, "proc", "/proc", e);
	case NW_ACCOUNT_FILES: return do_accounts(r, root, e);
	case NW_MQUEUE: return do_kernel_fs(root, "mqueue", "/dev/mqueue", e);
	case NW_LINK: {
		const char *name = strrchr(op->path, '/') + 1;
		char parent[NW_PATH];
		snprintf(parent, sizeof parent, "%.*s", (int)(name - op->path), op->path);
		at = target(root, parent, true, e);
		mnt = at < 0 || symlinkat(op->arg, at, name);
		nwp_close(&at);
		return mnt ? fail(e, "cannot link", op->path) : 0;
	}
	case NW_HOME:
		home = r->id.account ? r->id.account->home : NULL;
		/* Of a leased account the next tenant is somebody else: it must not find (or run: .bashrc) what this one leaves. */
		if (home && home[1] && r->id.lock >= 0) return do_tmpfs(root, home, 0700, nwp_scratch(r, HOME_SIZE), r->id.account, e);
		mnt = home && home[1] ? copy_host(home, NW_OP_RW | NW_OP_OPTIONAL, false, false, &dir, e) : -2;
		if (mnt >= 0 && (fstat(mnt, &st) || st.st_uid != r->id.uid)) { /* not its own: no home, whatever the policy child calls one (I2) */
			close(mnt);
			return 0;
		}
		return mnt == -2 ? 0 : mnt < 0 ? -1 : attach(root, mnt, home, dir, e);
	default:
		mnt = copy_host(op->path, op->flags, op->kind == NW_SLAVE, false, &dir, e);
		return mnt == -2 ? 0 : mnt < 0 ? -1 : attach(root, mnt, op->path, dir, e);
	}
}

/* A mount of what was opened before. A privileged launcher made it before the namespaces; without privilege that is only possible in here, so it
 * is opened again and must be the same one. */
static int again(const struct nw_dir *d, uint64_t more, struct stat *st, struct nw_err *e) {
	int mnt = d->mnt, fd;
	if (mnt < 0) {
		fd = nwp_openat2(AT_FDCWD, d->path, O_PATH | O_NOFOLLOW, 0, RESOLVE_NO_MAGICLINKS);
		if (fd < 0 || fstat(fd, st)) return fail(e, "cannot open", d->path);
		if (st->st_dev == d->dev && st->st_ino == d->ino) mnt = open_tree(fd, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH);
		close(fd);
		if (mnt < 0) return nw_fail(e, NW_USAGE, "NW-WORKDIR", "%s: was exchanged while it was opened, or cannot be shown", d->path);
	}
	if (fstat(mnt, st) == 0 && set_flags(mnt, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | more, 0, MS_PRIVATE, false) == 0) return mnt;
	close(mnt);
	return fail(e, "cannot restrict", d->path);
}

/* What the caller named, at that place. */
static int callers(int root, const struct nw_dir *d, const char *place, uint64_t more, struct nw_err *e) {
	struct stat st = { 0 };
	int mnt = again(d, more, &st, e);
	return mnt < 0 ? -1 : attach(root, mnt, place, S_ISDIR(st.st_mode), e);
}

/* What a container's runtime executes, which has no place in the root. Read-only by the mount: of the userns launcher's own files the payload may be
 * the owner, and whoever has a descriptor can open it again, for writing too (proc(5), /proc/PID/fd). */
int nwp_open_inside(struct nw_run *r, struct nw_err *e) {
	struct stat st;
	if (!r->decision.image) return 0;
	r->own.mnt = again(&r->own, MOUNT_ATTR_RDONLY, &st, e);
	return r->own.mnt < 0 ? -1 : 0;
}

static int loopback_up(struct nw_err *e) {
	struct ifreq q = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
	int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), bad = s < 0 || ioctl(s, SIOCSIFFLAGS, &q);
	nwp_close(&s);
	return bad ? nw_fail(e, NW_INTERNAL, "NW-NETWORK", "cannot bring up loopback: %s", strerror(errno)) : 0;
}

int nwp_build_root(struct nw_run *r, struct nw_err *e) {
	static const char *const options[] = { "mode", "0755", "size", "16m", NULL };
	int root, mnt;
	if (r->profile.namespaces & NW_NS_NET && loopback_up(e)) return -1;
	if (r->profile.hostname[0] && r->profile.namespaces & NW_NS_UTS && sethostname(r->profile.hostname, strlen(r->profile.hostname)))
		return fail(e, "cannot set the host name", r->profile.hostname);
	if (!(r->profile.namespaces & NW_NS_MOUNT)) return 0;
	umask(022);
	if (mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL)) return fail(e, "cannot separate from", "/");
	/* The root tree is attached at once (a detached one takes no mounts before Linux 6.15), and last of all becomes "/". Its
	 * mount point hides nothing that is still needed: sources are opened below the old "/", where /proc is not one of them. */
	root = new_fs("tmpfs", options, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
	if (root < 0 || (mnt = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC)) < 0) return fail(e, "no tmpfs for", "/");
	if (move_mount(root, "", mnt, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)) return fail(e, "cannot attach", "/");
	close(mnt);
	for (int i = 0; i < r->profile.n; i++)
		if (do_op(r, root, &r->profile.op[i], e)) return -1;
	for (int i = 0; i < r->decision.exposes; i++)
		if (callers(root, &r->expose[i], r->expose[i].path, 0, e)) return -1;
	if (r->decision.image && callers(root, &r->image, NW_IMAGE, MOUNT_ATTR_RDONLY, e)) return -1;
	if (r->decision.workdir && callers(root, &r->work, r->work.path, 0, e)) return -1;
	if (set_flags(root, MOUNT_ATTR_RDONLY, 0, 0, false)) return fail(e, "cannot close", "/");
	/* pivot_root(".", "."): the old root lands on top of the new one and is taken off (pivot_root(2), NOTES). */
	if (fchdir(root) || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/"))
		return fail(e, "cannot change to", "the new root");
	close(root);
	return 0;
}

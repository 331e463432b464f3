/* What is done to the entries of a tree that tree.c walks. Each is examined and changed by one descriptor: what is examined is what is changed,
 * whoever renames meanwhile. Only what needs no change is examined by name, and only removal is by name: there is no other way. */
#include "tree.h"

#define BENEATH (RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV)
#define FS_IOC_GETFLAGS _IOR('f', 1, long) /* linux/fs.h cannot be had together with sys/mount.h (glibc before 2.37) */
#define FS_IOC_SETFLAGS _IOW('f', 2, long)
#define LOCKED 0x30 /* FS_IMMUTABLE_FL, FS_APPEND_FL */

bool nwp_tree_owns(const struct walk *w, const struct stat *st) {
	return st->st_uid >= w->want->first && st->st_uid <= w->want->last;
}

/* Not changed since before the run: no rename, link, chmod, chown or new attribute leaves this time alone, and nobody can set it. Without
 * fractions the file system may not have any (ext4 with small inodes). */
bool nwp_tree_old(const struct walk *w, const struct stat *st) {
	const struct timespec *c = &st->st_ctim, *t = &w->want->since;
	return c->tv_sec < t->tv_sec || (c->tv_sec == t->tv_sec && c->tv_nsec && c->tv_nsec < t->tv_nsec);
}

/* What an entry is, without touching it. A mount point is not ours to enter, and what is mounted may never answer. */
int nwp_tree_look(int dir, const char *name, struct stat *st) {
	struct statx s;
	if (statx(dir, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC, STATX_BASIC_STATS, &s)) return -1;
	*st = (struct stat){ .st_mode = s.stx_mode, .st_uid = s.stx_uid, .st_nlink = s.stx_nlink, .st_ino = s.stx_ino };
	st->st_blocks = (blkcnt_t)s.stx_blocks;
	st->st_dev = makedev(s.stx_dev_major, s.stx_dev_minor);
	st->st_ctim = (struct timespec){ s.stx_ctime.tv_sec, s.stx_ctime.tv_nsec };
	if (!(s.stx_attributes & STATX_ATTR_MOUNT_ROOT)) return 0;
	errno = EXDEV;
	return -1;
}

void nwp_tree_left(struct walk *w, const char *name) {
	struct nw_tally *t = w->tally;
	const char *why = errno == EXDEV ? "a mount point" : errno == ESTALE ? "moved or replaced meanwhile" : strerror(errno);
	int head = w->used > 100 ? 100 : (int)w->used;
	char owner[32] = "";
	struct stat st;
	if (t->left < 4 && w->depth && nwp_tree_look(w->stack[w->depth - 1].fd, name, &st) == 0)
		snprintf(owner, sizeof owner, " (uid %u)", st.st_uid);
	if (t->left < 4)
		snprintf(t->left_path[t->left], sizeof t->left_path[0], "%.*s%s%.80s%s: %s", head, w->path ? w->path : "",
			(size_t)head < w->used ? "[...]/" : "", name, owner, why);
	t->left++;
	if (w->depth) w->stack[w->depth - 1].stays = true;
}

/* The thing itself, by descriptor: what is examined is what is changed, whoever renames meanwhile (the pilot's own processes may). */
static int pin(int dir, const char *name, struct stat *st) {
	int fd = nwp_openat2(dir, name, O_PATH | O_NOFOLLOW, 0, BENEATH);
	if (fd >= 0 && fstat(fd, st)) nwp_close(&fd);
	return fd;
}

/* Calls that refuse O_PATH take the kernel's own link to it: chmod (fchmodat2(2) came with Linux 6.6), xattrs (6.13). */
static const char *proc(int fd, char path[32]) {
	snprintf(path, 32, "/proc/self/fd/%d", fd);
	return path;
}

/* Immutable or append-only (chattr(1)): root's work, or a helper's. Where we may, it goes (CAP_LINUX_IMMUTABLE). */
static bool unlock(struct walk *w, int fd) {
	char path[32];
	int flags = 0, err = errno;
	struct stat st;
	if (err != EPERM || !(w->want->neutralise || w->want->remove) || fstat(fd, &st) || !(S_ISREG(st.st_mode) || S_ISDIR(st.st_mode)))
		return false;
	int real = open(proc(fd, path), O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
	bool locked = real >= 0 && ioctl(real, FS_IOC_GETFLAGS, &flags) == 0 && flags & LOCKED;
	flags &= ~LOCKED;
	bool done = locked && ioctl(real, FS_IOC_SETFLAGS, &flags) == 0;
	nwp_close(&real);
	w->tally->flags += done;
	errno = err;
	return done;
}

static int set_mode(struct walk *w, int fd, mode_t mode) {
	char path[32];
	return chmod(proc(fd, path), mode) && !(unlock(w, fd) && chmod(path, mode) == 0);
}

void nwp_tree_give(struct walk *w, int fd, const char *name, const struct stat *st) {
	const struct nw_walk *x = w->want;
	if (!x->chown || !nwp_tree_owns(w, st)) return;
	if (fchownat(fd, "", x->to_uid, x->to_gid, AT_EMPTY_PATH) && !(unlock(w, fd) && fchownat(fd, "", x->to_uid, x->to_gid, AT_EMPTY_PATH) == 0))
		nwp_tree_left(w, name);
}

/* By name, there is no other way: an entry that somebody puts in its place at that moment goes, if the owner of the tree may remove it. */
static int drop(struct walk *w, int dir, const char *name, int how) {
	struct stat st;
	if (unlinkat(dir, name, how) == 0 || errno == ENOENT) return 0;
	int err = errno, fd = pin(dir, name, &st);
	errno = err;
	bool unlocked = unlock(w, dir) | (fd >= 0 && unlock(w, fd));
	nwp_close(&fd);
	errno = err;
	return unlocked ? unlinkat(dir, name, how) : -1;
}

static void out(struct walk *w, int dir, const char *name, uint64_t *count) {
	if (drop(w, dir, name, 0)) nwp_tree_left(w, name);
	else ++*count;
}

/* "../" only at the front and not further than the top, nothing but names behind, or an absolute path into the tree: then no chain of
 * such links leads out, whatever the links are named. But one that was there before the run may, so the kernel has the last word; where it cannot be asked,
 * none of those stays. */
static bool stays_inside(const struct walk *w, const char *to) {
	size_t n = strlen(w->want->top), up = 0, base = w->used;
	char path[PATH_MAX];
	if (to[0] == '/') {
		if (strncmp(to, w->want->top, n) || (to[n] && to[n] != '/')) return false;
		to += n + strspn(to + n, "/");
		base = 0;
	} else {
		for (; strncmp(to, "..", 2) == 0 && (to[2] == '/' || !to[2]); to += to[2] ? 3 : 2) up++;
	}
	if (up >= w->depth) return false; /* links of the top directory itself are at depth 1 */
	for (const char *p = to; (p = strstr(p, "..")); p += 2)
		if ((p == to || p[-1] == '/') && (p[2] == '/' || !p[2])) return false;
	if (up) base = w->stack[w->depth - up].name;
	if (snprintf(path, sizeof path, "%.*s%s", (int)base, w->path ? w->path : "", to) >= PATH_MAX) return false;
	if (w->blind) return true;
	int fd = nwp_openat2(w->root, path[0] ? path : ".", O_PATH, 0, BENEATH);
	bool stays = fd >= 0 || errno == ENOENT || errno == ENOTDIR || errno == ELOOP;
	nwp_close(&fd);
	return stays;
}

/* The link of that name, or at fd when name is "". One that was there before the run is the pilot's business; a relative one only in the top
 * directory: further down the payload may have moved it, together with its directory. */
static bool harmless_link(const struct walk *w, int fd, const char *name, const struct stat *st) {
	char to[PATH_MAX];
	ssize_t n = readlinkat(fd, name, to, sizeof to - 1);
	if (n < 0) return false;
	to[n] = 0;
	return (nwp_tree_old(w, st) && !w->blind && (to[0] == '/' || w->depth == 1)) || stays_inside(w, to);
}

enum { CAPS = 1, ACL = 2, DEFAULT_ACL = 4 };

static int marks_of(ssize_t list_xattr(const char *, char *, size_t), const char *name) {
	static char list[65536]; /* XATTR_LIST_MAX */
	ssize_t n = list_xattr(name, list, sizeof list);
	int found = n < 0 && errno != ENOTSUP ? -1 : 0;
	for (const char *p = list; p < list + n; p += strlen(p) + 1)
		found |= !strcmp(p, "security.capability")        ? CAPS
			 : !strcmp(p, "system.posix_acl_access")  ? ACL
			 : !strcmp(p, "system.posix_acl_default") ? DEFAULT_ACL
								  : 0;
	return found;
}

/* Rights that a file would carry: set-id bits; file capabilities, which root of a nested user namespace may set; ACLs, by which others would
 * keep access to what is the pilot's. Any change of size takes capabilities off (security_inode_killpriv): the only way for an owner without
 * CAP_SETFCAP. Under an ACL the group's bits are its mask, which may be more than the group had: they go with it. */
void nwp_tree_disarm(struct walk *w, int fd, const char *name, const struct stat *st) {
	char path[32];
	int marks = marks_of(listxattr, proc(fd, path)), bad = 0;
	bool dir = S_ISDIR(st->st_mode), suid = !dir && st->st_mode & (S_ISUID | S_ISGID);
	mode_t mode = st->st_mode & (dir ? 07777 : 0777) & ~(marks & ACL ? 070u : 0u);
	if (marks < 0) return nwp_tree_left(w, name);
	if (dir) marks &= ~CAPS;
	if (!marks && !suid) return;
	if (marks & CAPS) bad = set_mode(w, fd, 0600) || truncate(path, st->st_size);
	bad = bad || set_mode(w, fd, mode) || (marks & ACL && removexattr(path, "system.posix_acl_access") && errno != ENODATA) ||
	      (marks & DEFAULT_ACL && removexattr(path, "system.posix_acl_default") && errno != ENODATA);
	if (bad) return nwp_tree_left(w, name);
	w->tally->suid += suid || marks & CAPS;
	w->tally->acls += (marks & (ACL | DEFAULT_ACL)) != 0;
}

/* Nothing to be done about it. Only examined by name, in the directory that is the working directory (fchdir in down()). */
static bool harmless(const struct walk *w, int dir, const char *name) {
	struct stat st;
	if (nwp_tree_look(dir, name, &st)) return false;
	if (S_ISLNK(st.st_mode)) return harmless_link(w, dir, name, &st);
	return nwp_tree_old(w, &st) || (S_ISREG(st.st_mode) && !(st.st_mode & (S_ISUID | S_ISGID)) && !marks_of(llistxattr, name));
}

void nwp_tree_file(struct walk *w, int dir, const char *name) {
	const struct nw_walk *x = w->want;
	struct nw_tally *t = w->tally;
	struct stat st;
	if (x->measure) { /* a file with several names counts once, when all of them are here */
		if (nwp_tree_look(dir, name, &st) == 0 && st.st_nlink) t->bytes += (uint64_t)st.st_blocks * 512 / st.st_nlink;
		return;
	}
	if (!x->chown && harmless(w, dir, name)) return;
	int fd = pin(dir, name, &st);
	if (fd < 0) {
		if (errno != ENOENT) nwp_tree_left(w, name);
		return;
	}
	if (S_ISDIR(st.st_mode)) {
		errno = ESTALE; /* it was none */
		nwp_tree_left(w, name);
	} else if (!x->neutralise) {
		if (!S_ISLNK(st.st_mode)) nwp_tree_give(w, fd, name, &st); /* a link keeps its time, so that its age is known afterwards */
	} else if (S_ISLNK(st.st_mode)) {
		if (harmless_link(w, fd, "", &st)) nwp_tree_give(w, fd, name, &st);
		else out(w, dir, name, &t->symlinks);
	} else if (x->chown && S_ISREG(st.st_mode) && st.st_nlink > 1 && !nwp_tree_owns(w, &st) && st.st_uid != x->to_uid) {
		out(w, dir, name, &t->foreign);
	} else if (nwp_tree_old(w, &st)) {
		nwp_tree_give(w, fd, name, &st);
	} else if (!S_ISREG(st.st_mode)) {
		out(w, dir, name, &t->special);
	} else {
		nwp_tree_disarm(w, fd, name, &st);
		nwp_tree_give(w, fd, name, &st);
	}
	close(fd);
}

/* What belongs to somebody else stays, and what is in it; in the top directory, which others share, without a word. */
static void foreign(struct walk *w, const char *name) {
	if (w->depth == 1) return;
	w->tally->foreign++;
	errno = EPERM;
	nwp_tree_left(w, name);
}

void nwp_tree_gone(struct walk *w, int dir, const char *name, int how) {
	bool told = w->depth ? w->stack[w->depth - 1].stays : w->tally->left > 0; /* of what is still in it */
	if (drop(w, dir, name, how) == 0) w->tally->removed++;
	else if (errno != ENOTEMPTY || !told) nwp_tree_left(w, name);
}

/* Removing: a file, or a directory that should be empty by now. */
void nwp_tree_take(struct walk *w, int dir, const char *name, int how) {
	const struct stat *keep = w->want->keep;
	struct stat st;
	if (nwp_tree_look(dir, name, &st)) {
		/* Gone is good. A mount has been told of, or, in a directory that others share, is theirs. */
		if (errno != ENOENT && (errno != EXDEV || (w->depth > 1 && !how))) nwp_tree_left(w, name);
	} else if (!nwp_tree_owns(w, &st)) {
		if (!how) foreign(w, name);
	} else if (keep && st.st_dev == keep->st_dev && st.st_ino == keep->st_ino) {
		w->stack[w->depth - 1].stays = true;
	} else {
		nwp_tree_gone(w, dir, name, how);
	}
}

/* A directory, opened up first when its owner closed it. */
int nwp_tree_open(struct walk *w, int dir, const char *name, struct stat *st) {
	int fd = nwp_openat2(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, BENEATH), pinned = -1;
	if (w->want->measure && fd >= 0 && fstat(fd, st) == 0) return w->tally->bytes += (uint64_t)st->st_blocks * 512, fd;
	if (w->want->measure) goto fail;
	if (fd < 0 && errno == EACCES) fd = pinned = w->depth ? pin(dir, name, st) : fcntl(dir, F_DUPFD_CLOEXEC, 0);
	if (fd < 0 || fstat(fd, st)) goto fail;
	bool may = nwp_tree_owns(w, st) || !w->want->remove;
	bool given = pinned >= 0 && w->want->chown && st->st_uid == w->want->to_uid; /* by a walk before, with all in it */
	if (given || (w->depth && !may)) {
		nwp_close(&fd);
		if (!given) foreign(w, name);
		errno = ENOENT; /* nothing to say any more */
		return -1;
	}
	if (may && (st->st_mode & 0700) != 0700 && set_mode(w, fd, (st->st_mode & 07777) | 0700)) goto fail;
	if (pinned < 0) return fd;
	fd = openat(pinned, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	close(pinned);
	return fd;
fail:
	nwp_close(&fd);
	return -1;
}

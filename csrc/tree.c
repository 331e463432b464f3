/* Walk a tree that a hostile payload made, by descriptor: any depth, any name, no link followed, no mount crossed. What goes back to
 * the pilot must not lead out of it (I19) or carry rights (I18). Nobody writes to it any more; the walk runs with its owner's rights. */
#include "run.h"

struct level {
	dev_t dev;
	ino_t ino;
	off_t next; /* where to go on in a directory that was left for one below */
	int pass;   /* 0: all but directories; 1: into directories; 2, when removing: the directories themselves */
	bool stays; /* something that has been told of keeps it from being removed */
};

struct entry {
	uint64_t ino;
	int64_t next;
	unsigned short len;
	unsigned char type;
	char name[];
}; /* struct linux_dirent64 */

struct walk {
	const struct nw_walk *want;
	struct nw_tally *tally;
	struct level *stack;
	size_t depth, room;
};

static void left(struct walk *w, const char *name) {
	struct nw_tally *t = w->tally;
	if (t->left < 4) snprintf(t->left_path[t->left], sizeof t->left_path[0], "%s (depth %zu): %s", name, w->depth, strerror(errno));
	t->left++;
	if (w->depth) w->stack[w->depth - 1].stays = true;
}

/* "../" only at the front and not further than the top, nothing but names behind, or an absolute path into the tree: then no chain of
 * such links leads out, whatever the links are named. */
static bool stays_inside(const struct walk *w, const char *to) {
	size_t n = strlen(w->want->top), up = 0;
	if (to[0] == '/') {
		if (strncmp(to, w->want->top, n) || (to[n] && to[n] != '/')) return false;
		to += n;
	} else {
		for (; strncmp(to, "..", 2) == 0 && (to[2] == '/' || !to[2]); to += to[2] ? 3 : 2) up++;
	}
	if (up >= w->depth) return false; /* links of the top directory itself are at depth 1 */
	for (const char *p = to; (p = strstr(p, "..")); p += 2)
		if ((p == to || p[-1] == '/') && (p[2] == '/' || !p[2])) return false;
	return true;
}

static bool ours(const struct walk *w, const struct stat *st) {
	return st->st_uid >= w->want->first && st->st_uid <= w->want->last;
}

/* By name, there is no other way: an entry that somebody puts in its place at that moment goes, if the owner of the tree may remove it. */
static void drop(struct walk *w, int dir, const char *name, uint64_t *count) {
	if (unlinkat(dir, name, 0)) left(w, name);
	else ++*count;
}

/* The thing itself, by descriptor: what is examined is what is changed, whoever renames meanwhile (the pilot's own processes may). A mount
 * point is not ours to enter. */
static int pin(int dir, const char *name, struct stat *st) {
	int fd = nwp_openat2(dir, name, O_PATH | O_NOFOLLOW, 0, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV);
	if (fd >= 0 && fstat(fd, st)) nwp_close(&fd);
	return fd;
}

static void give(struct walk *w, int fd, const char *name, const struct stat *st) {
	const struct nw_walk *x = w->want;
	if (!x->chown || !ours(w, st)) return;
	if (fchownat(fd, "", x->to_uid, x->to_gid, AT_EMPTY_PATH)) left(w, name);
}

/* fchmod(2) refuses O_PATH; the kernel's own link to it does not (fchmodat2(2) came with Linux 6.6). */
static int set_mode(int fd, mode_t mode) {
	char path[32];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	return chmod(path, mode);
}

/* Rights that a file would carry: set-id bits, and file capabilities, which root of a nested user namespace may set. Any change of size
 * takes the latter off (security_inode_killpriv): the only way for an owner without CAP_SETFCAP. */
static void disarm(struct walk *w, int fd, const char *name, const struct stat *st) {
	char path[32];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	bool caps = getxattr(path, "security.capability", NULL, 0) > 0;
	if (!caps && !(st->st_mode & (S_ISUID | S_ISGID))) return;
	if ((caps && (set_mode(fd, 0600) || truncate(path, st->st_size))) || set_mode(fd, st->st_mode & 0777)) left(w, name);
	else w->tally->suid++;
}

static void file(struct walk *w, int dir, int fd, const char *name, const struct stat *st) {
	const struct nw_walk *x = w->want;
	struct nw_tally *t = w->tally;
	char to[4096];
	if (x->neutralise && S_ISLNK(st->st_mode)) {
		ssize_t n = readlinkat(fd, "", to, sizeof to - 1);
		to[n > 0 ? n : 0] = 0;
		if (n < 0 || !stays_inside(w, to)) return drop(w, dir, name, &t->symlinks);
	} else if (x->neutralise && !S_ISREG(st->st_mode)) {
		return drop(w, dir, name, &t->special);
	} else if (x->neutralise && st->st_nlink > 1 && x->chown && !ours(w, st) && st->st_uid != x->to_uid) {
		return drop(w, dir, name, &t->foreign);
	} else if (x->neutralise) {
		disarm(w, fd, name, st);
	}
	give(w, fd, name, st);
}

static int push(struct walk *w, const struct stat *st) {
	if (w->depth == w->room) {
		struct level *more = realloc(w->stack, (w->room + 1024) * sizeof *more);
		if (!more) return -1;
		w->stack = more;
		w->room += 1024;
	}
	w->stack[w->depth++] = (struct level){ st->st_dev, st->st_ino, 0, 0, false };
	return 0;
}

/* Into a directory below; one that the owner closed is opened up first. -1: it stays as it is, and is reported. */
static int enter(struct walk *w, int pinned, const char *name, const struct stat *st) {
	bool closed = (st->st_mode & 0700) != 0700 && (!w->want->remove || ours(w, st)) && set_mode(pinned, (st->st_mode & 0777) | 0700);
	int fd = closed ? -1 : openat(pinned, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0 && errno == EACCES && w->want->chown && st->st_uid == w->want->to_uid) return -1; /* given by a walk before, with all in it */
	if (fd < 0 || push(w, st)) {
		left(w, name);
		nwp_close(&fd);
	}
	return fd;
}

/* Done with a directory. One in which something was left is kept, so that the next walk can still enter it. */
static void finish(struct walk *w, int dir) {
	struct stat st;
	if (fstat(dir, &st)) left(w, ".");
	else if (w->want->last_try || !w->stack[w->depth - 1].stays) give(w, dir, ".", &st);
	close(dir);
}

/* Back up by "..": nobody moves directories any more, and the inode proves it. */
static int leave(struct walk *w, int dir) {
	int up = openat(dir, "..", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	struct level *l;
	struct stat st;
	finish(w, dir);
	w->depth--;
	l = &w->stack[w->depth - 1];
	l->stays |= l[1].stays;
	if (up < 0 || fstat(up, &st) || st.st_dev != l->dev || st.st_ino != l->ino || lseek(up, l->next, SEEK_SET) < 0) {
		left(w, "..");
		nwp_close(&up);
	}
	return up;
}

/* What belongs to somebody else stays, and what is in it; in the top directory, which others share, without a word. */
static void foreign(struct walk *w, const char *name) {
	if (w->depth == 1) return;
	w->tally->foreign++;
	errno = EPERM;
	left(w, name);
}

/* Removing, in the pass that is on. Descriptor of the directory to go on in, or -1. */
static int take(struct walk *w, int dir, int fd, const char *name, const struct stat *st, int pass) {
	struct level *l = &w->stack[w->depth - 1];
	if (!ours(w, st)) {
		if (pass < 2) foreign(w, name);
	} else if (w->want->keep && st->st_dev == w->want->keep->st_dev && st->st_ino == w->want->keep->st_ino) {
		l->stays = true;
	} else if (pass == 1) {
		return enter(w, fd, name, st);
	} else if (unlinkat(dir, name, pass ? AT_REMOVEDIR : 0) == 0) {
		w->tally->removed++;
	} else if (errno != ENOENT && (errno != ENOTEMPTY || !l->stays)) {
		left(w, name);
	}
	return -1;
}

/* One entry in the pass that is on. Descriptor of the directory to go on in, or -1. */
static int visit(struct walk *w, int dir, const struct entry *x) {
	int pass = w->stack[w->depth - 1].pass, fd, down = -1;
	struct stat st;
	if (strcmp(x->name, ".") == 0 || strcmp(x->name, "..") == 0 || (x->type != DT_UNKNOWN && (x->type == DT_DIR) != (pass > 0))) return -1;
	if ((fd = pin(dir, x->name, &st)) < 0) {
		/* Gone is good. In a directory that others share, a mount is theirs. */
		if (errno != ENOENT && pass < 2 && !(w->want->remove && w->depth == 1 && errno == EXDEV)) left(w, x->name);
		return -1;
	}
	if (!S_ISDIR(st.st_mode) == (pass == 0)) {
		w->tally->entries += pass < 2;
		if (w->want->remove) down = take(w, dir, fd, x->name, &st, pass);
		else if (pass) down = enter(w, fd, x->name, &st);
		else file(w, dir, fd, x->name, &st);
	}
	close(fd);
	return down;
}

/* From the start. By a new descriptor: after lseek(2) to the end and a read there ext4 finds nothing at 0 (last_pos in ext4_dx_readdir). */
static int again(int dir) {
	int fd = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	close(dir);
	return fd;
}

/* The rest of one directory: first all but directories, then those, which are removed only in a pass of its own: while a directory is
 * left and come back to nothing in it goes, since an offset would not survive that on file systems that count entries (overlayfs, tmpfs
 * before Linux 6.6), and what it skips would go back as it is.
 * Descriptor of the directory to go on in, or -1 at the end of the walk. */
static int rest_of(struct walk *w, int dir) {
	static _Alignas(8) char buffer[32768];
	struct level *l = &w->stack[w->depth - 1];
	int last = w->want->remove ? 2 : 1;
	long n;
	if (!w->stack) return -1; /* for the analyser: nwp_tree has pushed the top */
	while ((n = syscall(SYS_getdents64, dir, buffer, sizeof buffer)) > 0 || (n == 0 && l->pass < last && (dir = again(dir)) >= 0)) {
		l->pass += n == 0;
		for (long at = 0; at < n;) {
			struct entry *x = (struct entry *)(void *)(buffer + at);
			at += x->len;
			l->next = x->next;
			int down = visit(w, dir, x);
			if (down >= 0) {
				close(dir);
				return down;
			}
		}
	}
	if (n < 0 || dir < 0) left(w, ".");
	if (dir < 0) return -1;
	if (w->depth > 1) return leave(w, dir);
	finish(w, dir);
	return -1;
}

void nwp_tree(int root, const struct nw_walk *want, struct nw_tally *t) {
	struct walk w = { want, t, NULL, 0, 0 };
	struct stat st;
	int dir = fstat(root, &st) ? (left(&w, "."), -1) : enter(&w, root, ".", &st); /* the payload may have closed the top as well */
	while (dir >= 0) dir = rest_of(&w, dir);
	free(w.stack);
}

/* What somebody left in a directory that others share. In a process that has the rights of the owner and no more (I8). */
void nwp_remove_owned(int dir, uid_t first, uid_t last, const struct stat *keep, struct nw_tally *t) {
	struct nw_walk w = { .top = "", .remove = true, .keep = keep, .first = first, .last = last };
	struct nw_tally was = *t;
	nwp_tree(dir, &w, t);
	if (t->left == was.left) return;
	was.removed = t->removed;
	*t = was; /* a second chance: a shortage may have passed */
	nwp_tree(dir, &w, t);
}

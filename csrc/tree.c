/* Walk a tree that a hostile payload made, by descriptor: any depth, any name, no link followed, no mount crossed. What goes back to
 * the pilot must not lead out of it (I19) or carry rights (I18). Nobody writes to it any more; the walk runs with its owner's rights. */
#include "run.h"

struct level {
	dev_t dev;
	ino_t ino;
	off_t next;
}; /* where to go on in a directory that was left for one below */

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
	if (up > w->depth) return false;
	for (const char *p = to; (p = strstr(p, "..")); p += 2)
		if ((p == to || p[-1] == '/') && (p[2] == '/' || !p[2])) return false;
	return true;
}

static void drop(struct walk *w, int dir, const char *name, uint64_t *count) {
	if (unlinkat(dir, name, 0)) left(w, name);
	else ++*count;
}

static void give(struct walk *w, int dir, const char *name, const struct stat *st) {
	const struct nw_walk *x = w->want;
	if (!x->chown || st->st_uid < x->first || st->st_uid > x->last) return;
	if (fchownat(dir, name, x->to_uid, x->to_gid, AT_SYMLINK_NOFOLLOW | (*name ? 0 : AT_EMPTY_PATH))) left(w, *name ? name : ".");
}

static void file(struct walk *w, int dir, const char *name, struct stat *st) {
	struct nw_tally *t = w->tally;
	char to[4096];
	ssize_t n;
	if (w->want->neutralise) {
		if (S_ISLNK(st->st_mode)) {
			n = readlinkat(dir, name, to, sizeof to - 1);
			to[n > 0 ? n : 0] = 0;
			if (n < 0 || !stays_inside(w, to)) return drop(w, dir, name, &t->symlinks);
		} else if (!S_ISREG(st->st_mode)) {
			return drop(w, dir, name, &t->special);
		} else if (st->st_mode & (S_ISUID | S_ISGID)) {
			if (fchmodat(dir, name, st->st_mode & 0777, 0)) left(w, name);
			else t->suid++;
		}
		if (S_ISREG(st->st_mode) && st->st_nlink > 1 && w->want->chown && (st->st_uid < w->want->first || st->st_uid > w->want->last) &&
			st->st_uid != w->want->to_uid)
			return drop(w, dir, name, &t->foreign);
	}
	give(w, dir, name, st);
}

static int push(struct walk *w, const struct stat *st) {
	if (w->depth == w->room) {
		struct level *more = realloc(w->stack, (w->room + 1024) * sizeof *more);
		if (!more) return -1;
		w->stack = more;
		w->room += 1024;
	}
	w->stack[w->depth++] = (struct level){ st->st_dev, st->st_ino, 0 };
	return 0;
}

/* Into a directory below; one that the owner closed is opened up first. -1: it stays as it is, and is reported. */
static int enter(struct walk *w, int dir, const char *name, struct stat *st) {
	const uint64_t how = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV;
	int fd;
	if ((st->st_mode & 0700) != 0700 && fchmodat(dir, name, (st->st_mode & 0777) | 0700, 0)) {
		left(w, name);
		return -1;
	}
	fd = nwp_openat2(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, how);
	if (fd < 0 || fstat(fd, st) || push(w, st)) {
		left(w, name);
		nwp_close(&fd);
	}
	return fd;
}

/* Back up by "..": nobody moves directories any more, and the inode proves it. */
static int leave(struct walk *w, int dir) {
	int up = openat(dir, "..", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	struct level *l;
	struct stat st;
	if (fstat(dir, &st) == 0) give(w, dir, "", &st);
	close(dir);
	w->depth--;
	l = &w->stack[w->depth - 1];
	if (up < 0 || fstat(up, &st) || st.st_dev != l->dev || st.st_ino != l->ino || lseek(up, l->next, SEEK_SET) < 0) {
		left(w, "..");
		nwp_close(&up);
	}
	return up;
}

/* The rest of one directory. Descriptor of the directory to go on in, or -1 at the end of the walk. */
static int rest_of(struct walk *w, int dir) {
	static _Alignas(8) char buffer[32768];
	long n;
	while ((n = syscall(SYS_getdents64, dir, buffer, sizeof buffer)) > 0)
		for (long at = 0; at < n;) {
			struct entry *x = (struct entry *)(void *)(buffer + at);
			struct stat st;
			int below;
			at += x->len;
			w->stack[w->depth - 1].next = x->next;
			if (strcmp(x->name, ".") == 0 || strcmp(x->name, "..") == 0) continue;
			w->tally->entries++;
			if (fstatat(dir, x->name, &st, AT_SYMLINK_NOFOLLOW)) {
				left(w, x->name);
			} else if (!S_ISDIR(st.st_mode)) {
				file(w, dir, x->name, &st);
			} else if ((below = enter(w, dir, x->name, &st)) >= 0) {
				close(dir);
				return below;
			}
		}
	if (n < 0) left(w, ".");
	if (w->depth > 1) return leave(w, dir);
	struct stat st;
	if (fstat(dir, &st) == 0) give(w, dir, "", &st);
	close(dir);
	return -1;
}

void nwp_tree(int root, const struct nw_walk *want, struct nw_tally *t) {
	struct walk w = { want, t, NULL, 0, 0 };
	int dir = openat(root, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	struct stat st;
	if (dir < 0 || fstat(dir, &st) || push(&w, &st)) {
		left(&w, ".");
		nwp_close(&dir);
	}
	while (dir >= 0) dir = rest_of(&w, dir);
	free(w.stack);
}

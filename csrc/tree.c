/* Walk a tree that a hostile payload made, by descriptor: any depth, any name, no link followed, no mount crossed. What goes back to
 * the pilot must not lead out of it (I19) or carry rights (I18); harm.c has what is done about that. The payload is dead; the walk runs with its
 * owner's rights. The pilot's own processes may rename meanwhile: they make the walk miss what they move, and never lead it to anything outside.
 *
 * Memory grows with depth alone: a level is about 80 bytes and its name. */
#include "tree.h"

#define HOLD 400    /* levels at the top whose directories stay open, where RLIMIT_NOFILE lets them */
#define NEAR 16     /* and those just left, with their entries; in between ".." leads back up */
#define MANY 4096   /* entries after which a second worker pays, */
#define WIDE 131072 /* or the size of a directory */

struct entry {
	uint64_t ino;
	int64_t next;
	unsigned short len;
	unsigned char type;
	char name[];
}; /* struct linux_dirent64 */

static struct window {
	size_t depth; /* whose it is */
	long at, size;
	int reads; /* 1: from the beginning of the directory; -1: these entries are all there are */
	_Alignas(8) char entries[32768];
} windows[NEAR];

static struct window *window(size_t depth) {
	return &windows[depth % NEAR];
}

static void reset(size_t depth, int reads) {
	struct window *o = window(depth);
	o->depth = depth;
	o->at = o->size = 0;
	o->reads = reads;
}

static int push(struct walk *w, int fd, const char *name, const struct stat *st) {
	size_t n = w->depth ? strlen(name) + 1 : 0;
	void *more;
	if (w->counts && w->depth >= w->hold) {
		errno = ENAMETOOLONG; /* there is no way to come back to where one was */
		return -1;
	}
	if (w->depth == w->room) {
		if (!(more = realloc(w->stack, (w->room + 1024) * sizeof *w->stack))) return -1;
		w->stack = more;
		w->room += 1024;
	}
	if (w->used + n + 1 > w->space) {
		if (!(more = realloc(w->path, w->space + 65536))) return -1;
		w->path = more;
		w->space += 65536;
	}
	w->stack[w->depth++] = (struct level){ .fd = fd, .dev = st->st_dev, .ino = st->st_ino, .name = w->used };
	if (n) snprintf(w->path + w->used, n + 1, "%s/", name);
	w->used += n;
	if (w->depth > w->hold + NEAR) nwp_close(&w->stack[w->depth - NEAR - 1].fd);
	reset(w->depth, 0);
	return 0;
}

/* From the start, with an offset of its own. */
static void again(int *dir) {
	int fd = openat(*dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	nwp_close(dir);
	*dir = fd;
}

/* A second worker for a large tree: a copy of this process. In the directories that are open now each does the entries that its half of the
 * names hashes to, with all that is below; those directories themselves are dealt with when both are done. */
static void share(struct walk *w) {
	cpu_set_t cpus;
	if (sched_getaffinity(0, sizeof cpus, &cpus) || CPU_COUNT(&cpus) < 2) return;
	w->half = mmap(NULL, sizeof *w->half, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, 0, 0);
	pid_t us = getpid();
	if (w->half == MAP_FAILED || (w->other = fork()) < 0) return;
	w->shared = w->chained = w->depth;
	w->me = w->other == 0;
	for (size_t i = 0; i < w->depth; i++) {
		struct level *l = &w->stack[i];
		size_t n = (i + 1 < w->depth ? l[1].name : w->used) - l->name;
		snprintf(w->chain_name[i], sizeof w->chain_name[i], "%.*s", n ? (int)n - 1 : 1, n ? w->path + l->name : ".");
		w->chain[i] = w->me ? -1 : fcntl(l->fd, F_DUPFD_CLOEXEC, 0);
		if (!w->me) continue;
		again(&l->fd);
		if (l->fd < 0 || lseek(l->fd, l->next, SEEK_SET) < 0) _exit(1);
		reset(i + 1, 2);
	}
	if (!w->me) return;
	w->tally = w->half;
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != us) _exit(1);
}

void nwp_tally_add(struct nw_tally *to, const struct nw_tally *t) {
	for (uint64_t i = 0; i < t->left && i < 4 && to->left + i < 4; i++)
		memcpy(to->left_path[to->left + i], t->left_path[i], sizeof *t->left_path);
	to->entries += t->entries, to->symlinks += t->symlinks, to->special += t->special, to->suid += t->suid, to->flags += t->flags;
	to->foreign += t->foreign, to->acls += t->acls, to->removed += t->removed, to->left += t->left;
}

/* Done with a directory. One in which something was left is kept, so that the next walk can still enter it. */
static void done(struct walk *w, int dir, const char *name, bool stays) {
	struct stat st;
	if (fstat(dir, &st)) nwp_tree_left(w, name);
	else if (w->want->last_try || !stays) nwp_tree_give(w, dir, name, &st);
}

/* Both halves together. */
static void join(struct walk *w) {
	if (w->me) _exit(0);
	if (w->other <= 0) return;
	struct pollfd end = { nwp_pidfd_open(w->other), POLLIN, 0 };
	while (end.fd >= 0 && poll(&end, 1, 500) == 0) kill(w->other, SIGCONT); /* as in nwp_hear_walk() */
	nwp_close(&end.fd);
	bool whole = nwp_wait(w->other, -1) == 0;
	nwp_tally_add(w->tally, w->half);
	munmap(w->half, sizeof *w->half);
	errno = ECHILD;
	if (!whole) nwp_tree_left(w, ".");
	for (size_t i = w->chained; i-- > 0; close(w->chain[i])) {
		if (w->want->chown) done(w, w->chain[i], w->chain_name[i], w->tally->left > 0);
		if (i && w->want->remove) nwp_tree_gone(w, w->chain[i - 1], w->chain_name[i], AT_REMOVEDIR);
	}
}

/* Into a directory below. */
static void down(struct walk *w, int dir, const char *name) {
	const struct nw_walk *x = w->want;
	struct stat st;
	int fd = nwp_tree_open(w, dir, name, &st);
	w->tally->entries += w->depth > 0;
	if (fd < 0 && (errno == ENOENT || (x->remove && w->depth == 1 && errno == EXDEV))) return; /* a mount in /tmp is not the payload's */
	if (fd < 0 || (x->neutralise && !x->chown && fchdir(fd)) || push(w, fd, name, &st)) {
		nwp_tree_left(w, name);
		return nwp_close(&fd);
	}
	if (x->neutralise && !nwp_tree_old(w, &st)) nwp_tree_disarm(w, fd, ".", &st);
	if (!x->measure && !w->half && !w->counts && w->depth <= SHARED && (w->tally->entries > MANY || st.st_size > WIDE)) share(w);
}

/* Back up. A directory that is not open any more is found by "..", and its inode proves that nobody has moved what we were in; else on from
 * the next one above that is. */
static void up(struct walk *w) {
	struct level *l = &w->stack[w->depth - 1], *p = w->depth > 1 ? l - 1 : NULL;
	bool find = p && p->fd < 0 && l->fd >= 0;
	struct stat st = { 0 };
	if (!w->stack) return; /* for the analyser: push() has set it */
	if (find) p->fd = openat(l->fd, "..", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (w->want->chown && w->depth > w->shared && l->fd >= 0) done(w, l->fd, ".", l->stays);
	nwp_close(&l->fd);
	if (w->used) w->path[w->used - 1] = 0;
	w->used = l->name;
	if (w->shared == w->depth) w->shared--;
	w->depth--;
	if (!p) return;
	p->stays |= l->stays;
	if (find && (p->fd < 0 || fstat(p->fd, &st) || st.st_dev != p->dev || st.st_ino != p->ino)) {
		errno = ESTALE;
		nwp_tree_left(w, ".");
		nwp_close(&p->fd);
	}
	if (p->fd < 0 || window(w->depth)->depth == w->depth) return;
	reset(w->depth, 2);
	if (lseek(p->fd, p->next, SEEK_SET) < 0) {
		nwp_tree_left(w, ".");
		nwp_close(&p->fd);
	} else if (find && w->want->remove && !p->stays && st.st_nlink == 3) { /* it was the only directory there, where this is counted */
		nwp_tree_gone(w, p->fd, w->path + l->name, AT_REMOVEDIR);
		p->pass = 2;
		window(w->depth)->reads = -1;
	}
}

/* The next entry of the present directory, or NULL at the end: first all but directories, then those, which are removed in a pass of their own:
 * while a directory is left for those below nothing in it goes, since an offset would not survive that on file systems that count entries (tmpfs
 * before Linux 6.6), and what it skips would go back as it is. */
static const struct entry *next(struct walk *w) {
	struct window *o = window(w->depth);
	struct level *l = &w->stack[w->depth - 1];
	while (o->at >= o->size) {
		if (l->fd < 0) return NULL;
		long n = o->reads < 0 ? 0 : syscall(SYS_getdents64, l->fd, o->entries, sizeof o->entries);
		o->at = 0;
		if (n > 0) {
			o->size = n;
			o->reads++;
		} else if (n < 0) {
			nwp_tree_left(w, ".");
			return NULL;
		} else if (!l->dirs || l->pass == (w->want->remove ? 2 : 1)) {
			o->size = 0;
			return NULL;
		} else if (o->reads == 1 || o->reads == -1) {
			o->reads = -1;
			l->pass++;
		} else {
			o->size = o->reads = 0;
			again(&l->fd); /* not by lseek(2): ext4 finds nothing at 0 after a read at the end (last_pos in ext4_dx_readdir) */
			if (l->fd < 0) nwp_tree_left(w, ".");
			l->pass++;
		}
	}
	const struct entry *x = (const struct entry *)(const void *)(o->entries + o->at);
	o->at += x->len;
	l->next = x->next;
	return x;
}

static unsigned half_of(const char *name) {
	unsigned h = 2166136261u; /* FNV-1a */
	for (; *name; name++) h = (h ^ (unsigned char)*name) * 16777619u;
	return h * 2654435769u >> 31;
}

/* One entry in the pass that is on. */
static void visit(struct walk *w, const struct entry *x) {
	struct level *l = &w->stack[w->depth - 1];
	int dir = l->fd;
	const char *name = x->name;
	struct stat st;
	if (name[0] == '.' && (!name[1] || (name[1] == '.' && !name[2]))) return;
	if (w->depth <= w->shared && (half_of(name) != w->me || (w->depth < w->chained && !strcmp(name, w->chain_name[w->depth])))) return;
	bool told = x->type != DT_UNKNOWN || nwp_tree_look(dir, name, &st) == 0;
	bool is_dir = x->type == DT_DIR || (x->type == DT_UNKNOWN && told && S_ISDIR(st.st_mode));
	if (!told && l->pass > 0 && errno != ENOENT && errno != EXDEV) nwp_tree_left(w, name);
	l->dirs |= is_dir;
	if (is_dir != (l->pass > 0)) return;
	w->tally->entries += !is_dir;
	if (l->pass == 1) down(w, dir, name);
	else if (w->want->remove) nwp_tree_take(w, dir, name, is_dir ? AT_REMOVEDIR : 0);
	else nwp_tree_file(w, dir, name);
}

void nwp_tree(int root, const struct nw_walk *want, struct nw_tally *t) {
	struct walk w = { .want = want, .tally = t, .root = root };
	struct rlimit files;
	struct statfs fs;
	w.hold = getrlimit(RLIMIT_NOFILE, &files) || files.rlim_cur > HOLD + 100 ? HOLD : files.rlim_cur < 64 ? 0 : files.rlim_cur - 60;
	w.counts = fstatfs(root, &fs) || fs.f_type == OVERLAYFS_SUPER_MAGIC || fs.f_type == FUSE_SUPER_MAGIC;
	int ask = nwp_openat2(root, "./.", O_PATH, 0, RESOLVE_BENEATH);
	w.blind = ask < 0 && errno == ENOSYS; /* a filter, our own for one */
	nwp_close(&ask);
	for (size_t i = 0; i < NEAR; i++) windows[i].depth = 0;
	down(&w, root, "."); /* the payload may have closed the top as well */
	while (w.depth) {
		const struct entry *x = next(&w);
		if (x) visit(&w, x);
		else up(&w);
	}
	join(&w);
	free(w.stack);
	free(w.path);
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

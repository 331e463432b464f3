/* The caller's directories: the work directory becomes the payload's by an idmapped mount where kernel and file system can
 * (mount_setattr(2): on disk everything stays the pilot's, nothing to hand back), else by chown there and back. */
#include "run.h"

/* Which one it is, whatever its name. */
int nwp_look_at(struct nw_dir *d) {
	struct statx x = { 0 };
	struct stat st;
	if (fstat(d->fd, &st)) return -1;
	d->dev = st.st_dev;
	d->ino = st.st_ino;
	if (statx(d->fd, "", AT_EMPTY_PATH, STATX_BTIME, &x) == 0 && x.stx_mask & STATX_BTIME)
		d->btime = (uint64_t)x.stx_btime.tv_sec * 1000000000 + x.stx_btime.tv_nsec;
	return 0;
}

int nwp_open_dir(struct nw_run *r, struct nw_dir *d, const char *path, struct nw_err *e) {
	d->path = path;
	if (!path) return 0;
	if (nwp_as_caller(r, true) == 0) d->fd = nwp_openat2(AT_FDCWD, path, O_PATH | O_DIRECTORY | O_NOFOLLOW, 0, RESOLVE_NO_MAGICLINKS);
	int err = errno;
	nwp_as_caller(r, false);
	/* A sweep has not the pilot's groups. It looks at what it got before it touches it. */
	if (d->fd < 0 && r->swept) d->fd = nwp_openat2(AT_FDCWD, path, O_PATH | O_DIRECTORY | O_NOFOLLOW, 0, RESOLVE_NO_MAGICLINKS);
	if (d->fd < 0) return nw_fail(e, NW_USAGE, "NW-WORKDIR", "%s: %s; give a directory of the pilot's (no symbolic link)", path, strerror(err));
	return nwp_look_at(d) ? nw_fail(e, NW_INTERNAL, "NW-WORKDIR", "%s: %s", path, strerror(errno)) : 0;
}

int nwp_open_dirs(struct nw_run *r, struct nw_err *e) {
	if (nwp_open_dir(r, &r->work, r->decision.workdir, e)) return -1;
	for (int i = 0; i < r->decision.exposes; i++)
		if (nwp_open_dir(r, &r->expose[i], r->decision.expose[i], e)) return -1;
	if (r->decision.image && (r->image.fd < 0 || !(r->profile.namespaces & NW_NS_MOUNT)))
		return nw_fail(e, NW_INTERNAL, "NW-CHILD", "the policy child wants an image shown that it has not opened, or where it cannot be");
	return 0;
}

/* A user namespace in which the caller's id on disk is the payload's: alive only until its descriptor is in the mount. */
static int idmap_namespace(struct nw_run *r) {
	char path[64], map[64];
	pid_t p = nwp_hold_namespace();
	int fd = -1;
	if (p < 0) return -1;
	snprintf(path, sizeof path, "/proc/%d/uid_map", (int)p);
	snprintf(map, sizeof map, "%u %u 1", r->caller.uid, r->id.uid);
	bool ok = nwp_write_file(path, map) == 0;
	snprintf(path, sizeof path, "/proc/%d/gid_map", (int)p);
	snprintf(map, sizeof map, "%u %u 1", r->caller.gid, r->id.gid);
	if (ok && nwp_write_file(path, map) == 0) {
		snprintf(path, sizeof path, "/proc/%d/ns/user", (int)p);
		fd = open(path, O_RDONLY | O_CLOEXEC);
	}
	nwp_wait(p, 0);
	return fd;
}

static int detach(struct nw_dir *d, struct nw_err *e) {
	d->mnt = open_tree(d->fd, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH);
	return d->mnt < 0 ? nw_fail(e, NW_INTERNAL, "NW-MOUNT", "cannot show %s: %s", d->path, strerror(errno)) : 0;
}

static bool idmap(struct nw_dir *d, int ns) {
	struct mount_attr a = { .attr_set = MOUNT_ATTR_IDMAP, .userns_fd = (uint64_t)ns };
	return ns >= 0 && mount_setattr(d->mnt, "", AT_EMPTY_PATH, &a, sizeof a) == 0;
}

static uid_t owner(const struct nw_dir *d) {
	struct stat st;
	return fstat(d->fd, &st) ? (uid_t)-1 : st.st_uid;
}

/* Only after the sweep: a dead run of the same directory has given it back by now. */
static int check_owner(const struct nw_run *r, const struct nw_dir *d, struct nw_err *e) {
	if (d->fd < 0 || owner(d) == r->caller.uid) return 0;
	return nw_fail(
		e, NW_USAGE, "NW-WORKDIR-OWNER", "%s: belongs to uid %u, not to the caller; give a directory of the pilot's", d->path, owner(d));
}

/* Exposed directories too: what one payload leaves there the next one can use, whatever its id, and on disk all is the pilot's. One that
 * cannot be mapped is seen as it is. */
int nwp_prepare_dirs(struct nw_run *r, struct nw_err *e) {
	if (check_owner(r, &r->work, e)) return -1;
	for (int i = 0; i < r->decision.exposes; i++)
		if (check_owner(r, &r->expose[i], e)) return -1;
	bool mounts = r->launcher->privileged && r->profile.namespaces & NW_NS_MOUNT, other = r->id.uid != r->caller.uid;
	bool image = mounts && r->decision.image;
	int ns = mounts && other && (r->work.fd >= 0 || r->decision.exposes || image) ? idmap_namespace(r) : -1, bad = 0;
	for (int i = 0; mounts && !bad && i < r->decision.exposes; i++) {
		bad = detach(&r->expose[i], e);
		if (!bad) idmap(&r->expose[i], ns);
	}
	if (!bad && image) bad = detach(&r->image, e);
	/* One that only the pilot may read is readable for its payload. */
	if (!bad && image && owner(&r->image) == r->caller.uid) idmap(&r->image, ns);
	if (!bad && mounts && r->work.fd >= 0) bad = detach(&r->work, e);
	if (!bad && other && r->work.fd >= 0) r->how = mounts && idmap(&r->work, ns) ? NW_IDMAP : NW_CHOWN;
	nwp_close(&ns);
	return bad;
}

/* How far the wall clock is ahead of the one that nobody can set, in microseconds. */
static int64_t ahead(void) {
	return (int64_t)nwp_realtime_us() - (int64_t)nwp_now_ms() * 1000;
}

/* The time before which a file must have been changed to be none of the payload's doing; 0 when nothing proves that: on a file system with a
 * clock of its own, when the wall clock has been set back meanwhile, in a sweep. */
static struct timespec since(const struct nw_run *r, const struct nw_dir *d) {
	struct statfs fs;
	if (r->started_us == 0) return (struct timespec){ INT64_MAX, 0 }; /* it has not run */
	if (r->given.tv_sec == 0 || ahead() < r->given_ahead - 100000 || fstatfs(d->fd, &fs)) return (struct timespec){ 0, 0 };
	bool local = fs.f_type == EXT4_SUPER_MAGIC || fs.f_type == XFS_SUPER_MAGIC || fs.f_type == BTRFS_SUPER_MAGIC || fs.f_type == TMPFS_MAGIC;
	return local ? r->given : (struct timespec){ 0, 0 };
}

/* Give the tree to the payload, or back to the pilot and made harmless. In a process that has the rights of the present owner plus
 * CAP_CHOWN (I8), and CAP_LINUX_IMMUTABLE on the way back: real root keeps only that; the userns launcher enters the namespace that it owns,
 * where the pilot is 0. */
static void __attribute__((noreturn)) walk(struct nw_run *r, const struct nw_dir *d, bool chown, bool to_payload, bool last, pid_t us, int out) {
	struct nw_tally t = { 0 };
	struct nw_identity *id = &r->id;
	bool inside = r->userns >= 0 && chown;
	uid_t pilot = inside ? 0 : r->caller.uid, payload = inside ? id->inside_uid : id->uid;
	gid_t pilots = inside ? 0 : r->caller.gid, payloads = inside ? id->inside_gid : id->gid;
	struct nw_walk w = { .top = d->path, .neutralise = !to_payload, .chown = chown, .last_try = last };
	uint64_t caps = (chown ? 1ull << CAP_CHOWN : 0) | (to_payload || inside ? 0 : 1ull << CAP_LINUX_IMMUTABLE);
	w.first = to_payload ? pilot : inside ? 1 : id->first;
	w.last = to_payload ? pilot : inside ? 65535 : id->first + id->block - 1;
	w.to_uid = to_payload ? payload : pilot;
	w.to_gid = to_payload ? payloads : pilots;
	if (!to_payload) w.since = since(r, d);
	bool pilot_owns = to_payload || !chown; /* idmapped or unchanged: on disk all of it is the pilot's */
	if (inside && setns(r->userns, CLONE_NEWUSER)) _exit(1);
	if ((r->launcher->privileged || inside) && nwp_keep_chown(pilot_owns ? pilot : payload, pilot_owns ? pilots : payloads, caps)) _exit(2);
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != us) _exit(3); /* it has the lease's lock */
	nwp_tree(d->fd, &w, &t);
	_exit(nwp_write_all(out, &t, sizeof t) != 0);
}

/* The tally of a process that walks, over the pipe whose ends are closed then; -1: it was cut short, or there was none. */
int nwp_hear_walk(pid_t p, int fd[2], struct nw_tally *t) {
	close(fd[1]);
	for (struct pollfd told = { fd[0], POLLIN, 0 }; p > 0 && poll(&told, 1, 500) == 0;) kill(p, SIGCONT); /* without root its pilot may stop it */
	bool whole = p > 0 && read(fd[0], t, sizeof *t) == (ssize_t)sizeof *t;
	close(fd[0]);
	return p < 0 || nwp_wait(p, -1) || !whole ? -1 : 0;
}

static int run_walk(struct nw_run *r, const struct nw_dir *d, bool chown, bool to_payload, bool last) {
	struct nw_tally t;
	int fd[2];
	if (pipe2(fd, O_CLOEXEC)) return -1;
	pid_t us = getpid(), p = fork();
	if (p == 0) walk(r, d, chown, to_payload, last, us, fd[1]);
	if (nwp_hear_walk(p, fd, &t)) return -1;
	nwp_tally_add(&r->tally, &t);
	return 0;
}

/* What was left, or a walk that was killed, gets a second chance: a shortage may have passed, and what has been done is soon passed over. */
static int walk_work(struct nw_run *r, bool chown, bool to_payload) {
	struct nw_tally *t = &r->tally;
	int bad = -1;
	for (int i = 0; i < 2 && (bad || t->left); i++) {
		t->entries = t->left = 0;
		memset(t->left_path, 0, sizeof t->left_path);
		bad = run_walk(r, &r->work, chown, to_payload, i == 1);
	}
	return bad;
}

int nwp_give_work(struct nw_run *r) {
	int bad = r->how == NW_CHOWN ? walk_work(r, true, true) : 0;
	memset(&r->tally, 0, sizeof r->tally); /* what counts is the way back */
	/* The clock that stamps files: it lags behind the exact one, and a file that the payload makes is never older than this. */
	r->given_ahead = ahead();
	if (clock_gettime(CLOCK_REALTIME_COARSE, &r->given)) r->given.tv_sec = 0;
	return bad;
}

/* The work directory alone: an exposed one is the pilot's, with links of its own, and stays as it is found. */
int nwp_take_back(struct nw_run *r) {
	return r->work.fd >= 0 ? walk_work(r, r->how == NW_CHOWN, false) : 0;
}

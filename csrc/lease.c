/* Step 5: who the payload will be, held exclusively where policy says so, and a durable note of what a death of ours would leave
 * to be undone. A lease lives exactly while its lock is held; locks are files that are never unlinked (else two could hold one). */
#include "run.h"

static int open_dir(struct nw_run *r, const char *name, struct nw_err *e) {
	uid_t owner = nwp_trusted_owner(r);
	int state = nwp_open_trusted(r->guard.state, owner, O_PATH | O_DIRECTORY, e), dir;
	if (state < 0) return -1;
	if (mkdirat(state, name, 0700) && errno != EEXIST)
		nw_fail(e, NW_INTERNAL, "NW-STATE", "%s/%s: %s; see state in the guard", r->guard.state, name, strerror(errno));
	char path[NW_PATH + 32];
	snprintf(path, sizeof path, "%s/%s", r->guard.state, name);
	close(state);
	dir = nwp_open_trusted(path, owner, O_RDONLY | O_DIRECTORY, e);
	return dir;
}

/* Blocks of different sizes may overlap: the kernel tells, by locks on ranges of one file (F_OFD_SETLK, fcntl(2)). The descriptor, held
 * until we exit, -1 when somebody has one of the ids, -2 with *e. */
static int lock_range(struct nw_run *r, int dir, uint32_t first, uint32_t size, struct nw_err *e) {
	struct flock range = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = first, .l_len = size };
	int fd = openat(dir, "map", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd >= 0 && fcntl(fd, F_OFD_SETLK, &range) == 0) return fd;
	int err = errno;
	nwp_close(&fd);
	return err == EAGAIN || err == EACCES ? -1 : nw_fail(e, NW_INTERNAL, "NW-STATE", "%s/ids/map: %s", r->guard.state, strerror(err)) - 1;
}

/* Take the lock of one id: 1 taken, 0 somebody has it, -1 with *e. */
static int lock_id(struct nw_run *r, int dir, uint32_t id, uid_t uid, struct nw_err *e) {
	char name[16];
	struct stat st;
	int fd;
	snprintf(name, sizeof name, "%u", id);
	fd = openat(dir, name, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0) return nw_fail(e, NW_INTERNAL, "NW-STATE", "%s/ids/%s: %s", r->guard.state, name, strerror(errno));
	if (flock(fd, LOCK_EX | LOCK_NB)) {
		close(fd);
		return 0;
	}
	/* Not empty: a former run under this id died before it could clean up. (The ids of a user namespace died with its init.) */
	if (fstat(fd, &st) || (st.st_size && r->launcher->privileged && nwp_sweep_uid(uid, uid)) || ftruncate(fd, 0) ||
		pwrite(fd, r->run, 36, 0) != 36) {
		close(fd);
		return nw_fail(e, NW_INTERNAL, "NW-STATE", "%s/ids/%s: cannot be taken over: %s", r->guard.state, name, strerror(errno));
	}
	r->id.lock = fd;
	return 1;
}

static int lease_account(struct nw_run *r, int dir, struct nw_err *e) {
	struct nw_decision *d = &r->decision;
	uint64_t start = nwp_realtime_us(); /* begin anywhere, so that callers do not queue for the first */
	for (int i = 0; i < d->accounts; i++) {
		const struct nw_account *a = &d->account[(start + (uint64_t)i) % (uint64_t)d->accounts];
		int got = d->exclusive ? lock_id(r, dir, a->uid, a->uid, e) : 1;
		if (got < 0) return -1;
		if (got) {
			r->id = (struct nw_identity){ a->uid, a->gid, a->uid, a->gid, 1, a->uid, a, r->id.lock };
			return 0;
		}
	}
	return nw_fail(e, NW_INTERNAL, "NW-POOL-BUSY", "every account of the pool is leased (%d); enlarge it in the policy or wait", d->accounts);
}

static int lease_block(struct nw_run *r, int dir, struct nw_err *e) {
	const struct nw_mapping *m = r->decision.map;
	struct nw_ranges own = { 1, { { m->first, m->first + m->count - 1 } } };
	const struct nw_ranges *from = r->launcher->privileged ? &r->guard.map_uid : &own;
	if (!r->launcher->privileged && m->count == 0) { /* one id: the caller's, seen as another inside */
		r->degrade[r->degrades++] = "uid-range"; /* the first of them: there is room */
		r->id = (struct nw_identity){ r->caller.uid, r->caller.gid, m->inside_uid, m->inside_gid, 1, r->caller.uid, NULL, -1 };
		return 0;
	}
	for (int i = 0; i < from->n; i++)
		for (uint64_t first = from->r[i].first; first + m->size - 1 <= from->r[i].last; first += m->size) {
			uint32_t f = (uint32_t)first, at = m->size > 1 ? m->inside_uid : 0;
			int range = lock_range(r, dir, f, m->size, e), got = range == -1 ? 0 : range < 0 ? -1 : lock_id(r, dir, f, f + at, e);
			if (got <= 0) nwp_close(&range);
			else r->range = range;
			if (got < 0) return -1;
			if (got) {
				r->id = (struct nw_identity){ f + at, f + (m->size > 1 ? m->inside_gid : 0), m->inside_uid, m->inside_gid, m->size, f,
					NULL, r->id.lock };
				return 0;
			}
		}
	return nw_fail(e, NW_INTERNAL, "NW-POOL-BUSY", "every block of %u ids is leased; enlarge map-uid in the guard (or /etc/subuid)", m->size);
}

static int write_lease(struct nw_run *r, struct nw_err *e) {
	char text[NW_PATH * 3 + 2048], name[64];
	int dir = open_dir(r, "leases", e), n;
	if (dir < 0) return -1;
	snprintf(name, sizeof name, "%s.lease", r->run);
	snprintf(r->lease, sizeof r->lease, "%s/leases/%.50s", r->guard.state, name);
	n = snprintf(text, sizeof text,
		"nodewrap-lease 1\nrun %s\nboot %s\nlauncher %d\nmode %s\nuid %u\nblock %u %u\ncgroup %s\nworkdir %llu %llu %d\npilot %u %u\n",
		r->run, r->boot, (int)getpid(), nw_mode_name[r->decision.mode], r->id.uid, r->id.first, r->id.block, r->cgroup[0] ? r->cgroup : "-",
		(unsigned long long)r->work.dev, (unsigned long long)r->work.ino, r->how, r->caller.uid, r->caller.gid);
	r->lease_fd = openat(dir, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (r->lease_fd < 0 || flock(r->lease_fd, LOCK_EX | LOCK_NB) || nwp_write_all(r->lease_fd, text, (size_t)n) || fsync(r->lease_fd)) {
		int err = errno;
		unlinkat(dir, name, 0);
		close(dir);
		return nw_fail(e, NW_INTERNAL, "NW-STATE", "%s: %s; without a durable lease nothing is started", r->lease, strerror(err));
	}
	close(dir);
	return 0;
}

int nwp_lease(struct nw_run *r, struct nw_err *e) {
	int dir = open_dir(r, "ids", e), bad = 0;
	if (dir < 0) return -1;
	r->id = (struct nw_identity){ r->caller.uid, r->caller.gid, r->caller.uid, r->caller.gid, 1, r->caller.uid, NULL, -1 };
	if (r->decision.mode == NW_SWITCH) bad = lease_account(r, dir, e);
	else if (r->decision.mode == NW_MAP) bad = lease_block(r, dir, e);
	close(dir);
	return bad ? -1 : write_lease(r, e);
}

/* The front's copies; the locks are the keeper's. */
void nwp_lease_leave(struct nw_run *r) {
	nwp_close(&r->lease_fd);
	nwp_close(&r->id.lock);
	nwp_close(&r->range);
}

/* Only after everything is undone: whoever finds the lock free and the file gone may rely on it. */
void nwp_lease_release(struct nw_run *r) {
	if (r->lease_fd >= 0) unlink(r->lease);
	nwp_close(&r->lease_fd);
	if (r->id.lock >= 0 && ftruncate(r->id.lock, 0) == 0) nwp_close(&r->id.lock);
}

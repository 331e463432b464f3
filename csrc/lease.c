/* Step 5: who the payload will be, held exclusively where policy says so, and a durable note of what a death of ours would leave
 * to be undone. A lease lives exactly while its lock is held; locks are files that are never unlinked (else two could hold one). */
#include "run.h"

int nwp_state_dir(struct nw_run *r, const char *name, struct nw_err *e) {
	uid_t owner = nwp_trusted_owner(r);
	char path[NW_PATH + 32];
	struct nw_err first = { 0 };
	snprintf(path, sizeof path, "%s/%s", r->guard.state, name);
	int dir = nwp_open_trusted(path, owner, O_RDONLY | O_DIRECTORY, &first), state;
	if (dir >= 0) return dir;
	if ((state = nwp_open_trusted(r->guard.state, owner, O_PATH | O_DIRECTORY, e)) < 0) return -1;
	int bad = mkdirat(state, name, 0700) && errno != EEXIST;
	if (bad) nw_fail(e, NW_INTERNAL, "NW-STATE", "%s/%s: %s; see state in the guard", r->guard.state, name, strerror(errno));
	close(state);
	return bad ? -1 : nwp_open_trusted(path, owner, O_RDONLY | O_DIRECTORY, e);
}

/* Blocks of different sizes may overlap: the kernel tells, by locks on ranges of one file (F_OFD_SETLK, fcntl(2)). The descriptor, held
 * until we exit, -1 when somebody has one of the ids, -2 with *e. */
int nwp_lock_range(struct nw_run *r, int dir, uint32_t first, uint32_t size, struct nw_err *e) {
	struct flock range = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = first, .l_len = size };
	int fd = openat(dir, "map", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd >= 0 && fcntl(fd, F_OFD_SETLK, &range) == 0) return fd;
	int err = errno;
	nwp_close(&fd);
	return err == EAGAIN || err == EACCES ? -1 : nw_fail(e, NW_INTERNAL, "NW-STATE", "%s/ids/map: %s", r->guard.state, strerror(err)) - 1;
}

/* An id that a dead run had is free again only when that run has been finished: its lease is gone. How many ids it claims, or 0. */
static uint32_t claimed(struct nw_run *r, int fd) {
	char text[64] = "", name[48];
	struct stat st;
	if (pread(fd, text, sizeof text - 1, 0) < 36) return 0;
	snprintf(name, sizeof name, "%.36s.lease", text);
	return fstatat(r->leases, name, &st, AT_SYMLINK_NOFOLLOW) == 0 ? (uint32_t)strtoul(text + 36, NULL, 10) : 0;
}

/* Take the lock of one id, or of a block that begins with it: 1 taken, 0 somebody has it, -1 with *e. */
static int lock_id(struct nw_run *r, int dir, uint32_t id, uint32_t size, uid_t uid, struct nw_err *e) {
	char name[16], text[64];
	struct stat st;
	int fd;
	snprintf(name, sizeof name, "%u", id);
	snprintf(text, sizeof text, "%s %10u\n", r->run, size);
	fd = openat(dir, name, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0) return nw_fail(e, NW_INTERNAL, "NW-STATE", "%s/ids/%s: %s", r->guard.state, name, strerror(errno));
	if (flock(fd, LOCK_EX | LOCK_NB) || claimed(r, fd)) {
		close(fd);
		return 0;
	}
	/* Not empty: a former run died between this and its lease, or was forgotten (--forget). */
	if (fstat(fd, &st) || (st.st_size && r->launcher->privileged && nwp_sweep_uid(r, uid, uid)) || ftruncate(fd, 0) || nwp_write_all(fd, text, 48)) {
		close(fd);
		return nw_fail(e, NW_INTERNAL, "NW-STATE", "%s/ids/%s: cannot be taken over: %s", r->guard.state, name, strerror(errno));
	}
	r->id.lock = fd;
	r->id.lock_id = id;
	return 1;
}

/* Blocks of other sizes, whose locks died with their runs: looked for only when there is such a run. */
static bool overlaps_dead(struct nw_run *r, int dir, uint32_t first, uint32_t size) {
	DIR *d = r->unswept ? nwp_list(dir) : NULL;
	bool found = r->unswept && !d; /* what cannot be read is taken for one */
	for (struct dirent *x; d && !found && (x = nwp_entry(d, &found));) {
		uint64_t id = strtoul(x->d_name, NULL, 10);
		int fd = id && id != first ? openat(dir, x->d_name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW) : -1;
		uint32_t n = fd < 0 ? 0 : claimed(r, fd);
		found = n && id < (uint64_t)first + size && first < id + n;
		nwp_close(&fd);
	}
	if (d) closedir(d);
	return found;
}

static int lease_account(struct nw_run *r, int dir, struct nw_err *e) {
	struct nw_decision *d = &r->decision;
	uint64_t start = nwp_realtime_us(); /* begin anywhere, so that callers do not queue for the first */
	for (int i = 0; i < d->accounts; i++) {
		const struct nw_account *a = &d->account[(start + (uint64_t)i) % (uint64_t)d->accounts];
		int got = d->exclusive ? lock_id(r, dir, a->uid, 1, a->uid, e) : 1;
		if (got < 0) return -1;
		if (got) {
			r->id = (struct nw_identity){ a->uid, a->gid, a->uid, a->gid, 1, a->uid, a, r->id.lock, r->id.lock_id };
			return 0;
		}
	}
	return nw_fail(e, NW_INTERNAL, "NW-POOL-BUSY", "every account of the pool is leased (%d); enlarge it in the policy or wait%s", d->accounts,
		r->unswept ? ", and see \"nodewrap sweep\": a dead run could not be finished" : "");
}

static int lease_block(struct nw_run *r, int dir, struct nw_err *e) {
	const struct nw_mapping *m = r->decision.map;
	struct nw_ranges own = { 1, { { m->first, m->first + m->count - 1 } } };
	const struct nw_ranges *from = r->launcher->privileged ? &r->guard.map_uid : &own;
	if (!r->launcher->privileged && m->count == 0) { /* one id: the caller's, seen as another inside */
		r->degrade[r->degrades++] = "uid-range"; /* the first of them: there is room */
		r->id = (struct nw_identity){ r->caller.uid, r->caller.gid, m->inside_uid, m->inside_gid, 1, r->caller.uid, NULL, -1, 0 };
		return 0;
	}
	for (int i = 0; i < from->n; i++)
		for (uint64_t first = from->r[i].first; first + m->size - 1 <= from->r[i].last; first += m->size) {
			uint32_t f = (uint32_t)first, at = m->size > 1 ? m->inside_uid : 0;
			int range = nwp_lock_range(r, dir, f, m->size, e), got = range == -1 ? 0 : range < 0 ? -1 : !overlaps_dead(r, dir, f, m->size);
			if (got > 0) got = lock_id(r, dir, f, m->size, f + at, e);
			if (got <= 0) nwp_close(&range);
			else r->range = range;
			if (got < 0) return -1;
			if (got) {
				r->id = (struct nw_identity){ f + at, f + (m->size > 1 ? m->inside_gid : 0), m->inside_uid, m->inside_gid, m->size, f,
					NULL, r->id.lock, f };
				return 0;
			}
		}
	return nw_fail(e, NW_INTERNAL, "NW-POOL-BUSY", "every block of %u ids is leased; enlarge map-uid in the guard (or /etc/subuid)", m->size);
}

/* Field 22 of /proc/PID/stat (proc(5)); the name before it may hold anything. 0: no such process. */
uint64_t nwp_ticks(pid_t pid) {
	char path[32], text[1024], *p;
	unsigned long long ticks = 0;
	snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
	nwp_close(&fd);
	text[n > 0 ? n : 0] = 0;
	if (!(p = strrchr(text, ')'))) return 0;
	sscanf(p + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu", &ticks);
	return ticks;
}

#define HANDLE_HEX (2 * MAX_HANDLE_SZ + 1)

/* By which root finds a directory again wherever its owner moves it; not every file system has one. */
static bool handle_of(int fd, uint32_t *type, char *hex) {
	union {
		struct file_handle h;
		char room[sizeof(struct file_handle) + MAX_HANDLE_SZ];
	} u = { .h.handle_bytes = MAX_HANDLE_SZ };
	int mount;
	if (name_to_handle_at(fd, "", &u.h, &mount, AT_EMPTY_PATH)) return false;
	for (unsigned i = 0; i < u.h.handle_bytes; i++) snprintf(hex + 2 * (size_t)i, 3, "%02x", u.h.f_handle[i]);
	*type = (uint32_t)u.h.handle_type;
	return true;
}

static size_t compose(struct nw_run *r, char *to, size_t max) {
	static struct nw_lease l;
	static char hex[HANDLE_HEX];
	const struct nw_decision *d = &r->decision;
	const struct nw_identity *id = &r->id;
	bool host_view = !(r->profile.namespaces & NW_NS_MOUNT);
	r->lease_us = nwp_realtime_us();
	l = (struct nw_lease){ .run = r->run, .boot = r->boot, .time_us = r->lease_us, .launcher = r->launcher->name, .front = (uint32_t)r->front_pid };
	l.front_ticks = nwp_ticks(r->front_pid);
	l.pilot_uid = r->caller.uid, l.pilot_gid = r->caller.gid, l.pilot_pid = (uint32_t)r->caller.ppid;
	l.mode = d->mode, l.profile = d->profile;
	l.uid = id->uid, l.gid = id->gid, l.inside_uid = id->inside_uid, l.inside_gid = id->inside_gid, l.first = id->first, l.size = id->block;
	l.has_account = id->account, l.account = id->account ? id->account->name : NULL;
	l.has_lock = id->lock >= 0, l.lock = id->lock_id;
	l.has_cgroup = r->cgroup[0], l.cgroup = r->cgroup;
	l.has_disk = r->disk[0], l.disk = r->disk;
	l.has_work = r->work.fd >= 0, l.path = l.has_work ? r->work.path : NULL;
	l.how = r->how, l.dev = r->work.dev, l.ino = r->work.ino, l.btime = r->work.btime;
	l.has_handle = l.has_work && r->how == NW_CHOWN && handle_of(r->work.fd, &l.handle_type, hex), l.handle = hex;
	for (int i = 0; host_view && i < d->files; i++) {
		if (!nw_lease_holds(d->file[i].path)) return 0; /* cut, it would name another file */
		if (d->file[i].temporary) l.file[l.files++] = d->file[i].path;
	}
	l.facts = d->facts;
	memcpy(l.fact, d->fact, sizeof *l.fact * (size_t)d->facts);
	return nw_lease_write(&l, to, max);
}

/* Alive is whose lock is held (flock). Beside it a lock that others can ask for without taking it (F_OFD_GETLK, fcntl(2)): who looks for dead leases
 * inside a cgroup that its pilot may freeze must hold none. */
int nwp_lock_lease(int fd, int how) {
	struct flock whole = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	return flock(fd, LOCK_EX | how) || fcntl(fd, F_OFD_SETLK, &whole) ? -1 : 0;
}

/* Made, locked, written, synced, in this order. A sweep may come between the first two and take the empty file away: then again. */
int nwp_lease_write(struct nw_run *r, struct nw_err *e) {
	static char text[NW_LEASE_MAX];
	char name[48];
	struct stat st;
	size_t n = compose(r, text, sizeof text);
	snprintf(name, sizeof name, "%s.lease", r->run);
	for (int again = 0; n && again < 100; again++) {
		r->lease_fd = openat(r->leases, name, O_RDWR | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
		if (r->lease_fd < 0 || nwp_lock_lease(r->lease_fd, 0) || fstat(r->lease_fd, &st)) break;
		if (st.st_nlink == 0) {
			nwp_close(&r->lease_fd);
			continue;
		}
		if (nwp_write_all(r->lease_fd, text, n) || fsync(r->lease_fd)) break;
		return 0;
	}
	int err = n ? errno : ENAMETOOLONG;
	if (r->lease_fd >= 0) unlinkat(r->leases, name, 0);
	nwp_close(&r->lease_fd);
	return nw_fail(e, NW_INTERNAL, "NW-STATE", "%s/leases/%s: %s; without a durable lease nothing is started", r->guard.state, name, strerror(err));
}

/* What was not known before. From here on somebody may run under this lease, and its end is due in the records. Not synced: after a reboot
 * a sweep takes it for granted. */
int nwp_lease_starting(struct nw_run *r, struct nw_err *e) {
	char text[256];
	int n = 0;
	if (r->role == NW_KEEPER)
		n = snprintf(text, sizeof text, "keeper %d %llu\n", (int)getpid(), (unsigned long long)nwp_ticks(getpid()));
	n += snprintf(text + n, sizeof text - (size_t)n, "init %d %llu\n", (int)r->init, (unsigned long long)nwp_ticks(r->init));
	if (r->address) n += snprintf(text + n, sizeof text - (size_t)n, "address %u\n", r->address);
	if (r->session != AUDIT_SID_UNSET) n += snprintf(text + n, sizeof text - (size_t)n, "session %u\n", r->session);
	n += snprintf(text + n, sizeof text - (size_t)n, "starting\n");
	return nwp_write_all(r->lease_fd, text, (size_t)n) ? nw_fail(e, NW_INTERNAL, "NW-STATE", "%s/leases: %s", r->guard.state, strerror(errno)) : 0;
}

/* Who it will be. Dead runs first: they may hold what this one needs. */
int nwp_lease(struct nw_run *r, struct nw_err *e) {
	int dir, bad = 0;
	if (nwp_sweep_before(r, e)) return -1;
	if ((dir = nwp_state_dir(r, "ids", e)) < 0) return -1;
	r->id = (struct nw_identity){ r->caller.uid, r->caller.gid, r->caller.uid, r->caller.gid, 1, r->caller.uid, NULL, -1, 0 };
	if (r->decision.mode == NW_SWITCH) bad = lease_account(r, dir, e);
	else if (r->decision.mode == NW_MAP) bad = lease_block(r, dir, e);
	if (!bad) bad = nwp_share_id(r, dir, e);
	close(dir);
	return bad;
}

/* Only after everything is undone: whoever finds the lock free and the file gone may rely on it. */
int nwp_lease_release(struct nw_run *r) {
	char name[48];
	snprintf(name, sizeof name, "%s.lease", r->run);
	if (r->lease_fd >= 0 && unlinkat(r->leases, name, 0) && errno != ENOENT) return -1;
	nwp_close(&r->lease_fd);
	if (r->id.lock >= 0 && ftruncate(r->id.lock, 0) == 0) nwp_close(&r->id.lock);
	return 0;
}

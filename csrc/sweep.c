/* What dead runs left: each is rebuilt from its lease and ended as its keeper would have ended it (docs/lease.md). Every step may be cut short
 * and done again, so a sweeper may be killed at any time, and is, when it takes too long. */
#include "run.h"
#include "json.h"

#define TOGETHER 8
#define BEFORE_RUN_MS 2000
#define EACH_MS 600000
#define DYING_MS 200

enum { SWEPT, LEFT, BROKEN, LIVE, FORGOTTEN };

static bool reporting; /* the program for administrators; else a launcher, which has nothing to say here */

static int report(const char *name, int state, const struct nw_err *e) {
	static const char *const word[] = { "swept", "left", "broken", "live", "forgotten" };
	char line[1024], run[37];
	struct nw_json j;
	snprintf(run, sizeof run, "%.36s", name);
	nw_json_begin(&j, line, sizeof line, 600);
	nw_json_string(&j, "run", run);
	nw_json_string(&j, "state", word[state]);
	if (state == LEFT || state == BROKEN) nw_json_string(&j, "code", e->code), nw_json_string(&j, "text", e->text);
	size_t n = nw_json_end(&j);
	return reporting && nwp_write_all(1, line, n) ? LEFT : state;
}

static int broken(struct nw_err *e, const char *what) {
	return nw_fail(e, NW_INTERNAL, "NW-LEASE", "%s; nothing of this run is touched, see \"nodewrap sweep --forget\"", what);
}

/* The lease, locked by us: 1. 0: alive, or gone meanwhile. -1: not to be touched, with *e. */
static int take(const struct nw_run *by, const char *name, int *fd, struct stat *st, struct nw_err *e) {
	*fd = openat(by->leases, name, O_RDWR | O_APPEND | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY);
	if (*fd < 0 && errno == ENOENT) return 0;
	if (*fd < 0 || fstat(*fd, st)) return broken(e, strerror(errno));
	if (!S_ISREG(st->st_mode) || st->st_uid != nwp_trusted_owner(by) || st->st_mode & 077)
		return broken(e, "not a regular file of the trusted owner's with mode 0600");
	if (nwp_lock_lease(*fd, LOCK_NB)) return errno == EWOULDBLOCK ? 0 : broken(e, strerror(errno));
	return fstat(*fd, st) ? broken(e, strerror(errno)) : st->st_nlink > 0;
}

static int read_lease(int fd, struct nw_lease *l, struct nw_err *e) {
	static char text[NW_LEASE_MAX + 2];
	ssize_t n = pread(fd, text, sizeof text - 1, 0);
	if (n < 0 || n > NW_LEASE_MAX) return broken(e, n < 0 ? strerror(errno) : "too large");
	while (n && text[n - 1] != '\n') n--; /* a death within an appended line: that line was not written */
	if (nw_lease_parse(text, (size_t)n, l, e) == 0) return 0;
	struct nw_err why = *e;
	return broken(e, why.text);
}

static bool in_one_range(const struct nw_ranges *x, uint32_t first, uint32_t size) {
	for (int i = 0; i < x->n; i++)
		if (first >= x->r[i].first && (uint64_t)first + size - 1 <= x->r[i].last) return true;
	return false;
}

/* A lease is written by root alone, and yet: whatever it says, nobody is killed and nothing changed beyond what the guard allows a run. */
static int check(const struct nw_run *by, const struct nw_lease *l, const char *name, struct nw_err *e) {
	const struct nw_guard *g = &by->guard;
	size_t base = strlen(g->cgroup), n = l->has_cgroup ? strlen(l->cgroup) : 0;
	bool root = by->launcher->privileged, one = l->first == l->uid && l->size == 1;
	bool ids = l->mode == NW_LOG_ONLY ? l->uid == l->pilot_uid && one && !l->has_lock
		   : l->mode == NW_SWITCH ? root && one && nw_in_ranges(&g->switch_uid, l->uid) && nw_in_ranges(&g->switch_gid, l->gid)
					  : !root || in_one_range(&g->map_uid, l->first, l->size);
	if (strncmp(name, l->run, 36) || strcmp(name + 36, ".lease")) return broken(e, "the file has another run's name");
	if (strcmp(l->launcher, by->launcher->name)) return broken(e, "written by another launcher than the guard's");
	if (!ids || l->size == 0 || l->size > 65536 || l->uid < l->first || l->uid - l->first >= l->size || (l->has_lock && l->lock != l->first) ||
		(root ? l->uid == 0 || l->pilot_uid == 0 : l->pilot_uid != by->caller.uid))
		return broken(e, "its ids are not what the guard gives a run");
	if (l->has_cgroup && (n < base + 46 || !base || strncmp(l->cgroup, g->cgroup, base) || l->cgroup[base] != '/' || strstr(l->cgroup, "/..") ||
				     strncmp(l->cgroup + n - 46, "/nodewrap-", 10) || strcmp(l->cgroup + n - 36, l->run)))
		return broken(e, "its cgroup is not the run's");
	if (l->has_disk && (!g->tmp_dir[0] || strncmp(l->disk, g->tmp_dir, strlen(g->tmp_dir)) || l->disk[strlen(g->tmp_dir)] != '/' ||
				   strcmp(l->disk + strlen(g->tmp_dir) + 1, l->run)))
		return broken(e, "its directory on disk is not the run's below tmp-dir of the guard");
	return l->has_work && (!l->path || l->path[0] != '/') ? broken(e, "it has a work directory without a path") : 0;
}

/* The id's lock, when the id is still this run's. Not for long in anybody else's hands: who finds the run's name in it lets go at once. */
static int lock_ids(struct nw_run *r, uint32_t id, struct nw_err *e) {
	char name[16], text[37] = "";
	int dir = nwp_state_dir(r, "ids", e), busy = -1;
	if (dir < 0) return -1;
	snprintf(name, sizeof name, "%u", id);
	int fd = openat(dir, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
	if (r->decision.mode == NW_MAP) r->range = nwp_lock_range(r, dir, r->id.first, r->id.block, e); /* from blocks of other sizes */
	close(dir);
	if (r->decision.mode == NW_MAP && r->range < 0) {
		nwp_close(&fd);
		return r->range == -2 ? -1 : nw_fail(e, NW_INTERNAL, "NW-STATE", "%s/ids/map: ids of the run are in use", r->guard.state);
	}
	if (fd < 0) return errno == ENOENT ? 0 : nw_fail(e, NW_INTERNAL, "NW-STATE", "%s/ids/%s: %s", r->guard.state, name, strerror(errno));
	for (int i = 0; i < 1000 && (busy = flock(fd, LOCK_EX | LOCK_NB)); i++) usleep(1000);
	if (busy) {
		close(fd);
		return nw_fail(e, NW_INTERNAL, "NW-STATE", "%s/ids/%s is locked by somebody else; sweep again", r->guard.state, name);
	}
	ssize_t n = pread(fd, text, 36, 0);
	/* Empty, with the lease there still: lost with the power, as nobody syncs it. Written again, it keeps others off should we not come to the end. */
	if (n >= 0 && !text[0] && (ftruncate(fd, 0) || dprintf(fd, "%s %10u\n", r->run, r->id.block) != 48)) n = -1;
	if (n < 0 || (text[0] && strcmp(text, r->run))) close(fd);
	else r->id.lock = fd, r->id.lock_id = id;
	return n < 0 ? nw_fail(e, NW_INTERNAL, "NW-STATE", "%s/ids/%s: %s", r->guard.state, name, strerror(errno)) : 0;
}

/* The directory that its pilot has renamed, maybe to keep what the payload made there: by the number that the file system gave it. It wants any
 * descriptor of that file system. -1: it is gone. -2: not to be told from here (another mount namespace, say). */
static int by_handle(const struct nw_lease *l, bool this_boot) {
	union {
		struct file_handle h;
		char room[sizeof(struct file_handle) + MAX_HANDLE_SZ];
	} u = { .h.handle_type = (int)l->handle_type, .h.handle_bytes = (unsigned)strlen(l->handle) / 2 };
	char path[PATH_MAX], *slash;
	struct stat st;
	int fd = -2;
	if (u.h.handle_bytes > MAX_HANDLE_SZ || snprintf(path, sizeof path, "%s", l->path) >= (int)sizeof path) return -2;
	for (unsigned i = 0; i < u.h.handle_bytes; i++) sscanf(l->handle + 2 * (size_t)i, "%2hhx", &u.h.f_handle[i]);
	while (fd == -2 && (slash = strrchr(path, '/')) && path[1]) {
		slash[slash == path] = 0;
		int at = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		if (at >= 0 && fstat(at, &st) == 0 && (!this_boot || st.st_dev == l->dev)) fd = open_by_handle_at(at, &u.h, O_PATH | O_CLOEXEC);
		if (fd == -1 && errno != ESTALE) fd = -2;
		nwp_close(&at);
	}
	if (fd < 0 || (fstat(fd, &st) == 0 && st.st_nlink > 0)) return fd;
	close(fd); /* removed, and in memory still */
	return -1;
}

static bool is_leased(const struct nw_dir *d, const struct nw_lease *l, bool this_boot) {
	return d->fd >= 0 && d->ino == l->ino && d->btime == l->btime && (!this_boot || d->dev == l->dev);
}

/* The directory that the lease means, or none: what now has its name may be anybody's. */
static int find_work(struct nw_run *r, const struct nw_lease *l, bool this_boot, struct nw_err *e) {
	struct stat st;
	struct nw_err gone;
	if (!l->has_work) return 0;
	r->how = (enum nw_handover)l->how;
	if (nwp_open_dir(r, &r->work, l->path, &gone)) {
		bool there = fstatat(AT_FDCWD, l->path, &st, AT_SYMLINK_NOFOLLOW) == 0;
		if (there ? S_ISDIR(st.st_mode) : errno != ENOENT && errno != ENOTDIR && errno != ELOOP) return *e = gone, -1;
	}
	if (is_leased(&r->work, l, this_boot)) return 0;
	nwp_close(&r->work.fd);
	if (l->has_handle && r->launcher->privileged) {
		if ((r->work.fd = by_handle(l, this_boot)) == -2 || (r->work.fd >= 0 && nwp_look_at(&r->work)))
			return nw_fail(
				e, NW_INTERNAL, "NW-LEASE", "%.300s cannot be found from here; sweep where its file system is mounted", l->path);
		if (is_leased(&r->work, l, this_boot)) return 0;
		nwp_close(&r->work.fd);
	}
	snprintf(r->tally.left_path[0], sizeof r->tally.left_path[0], "%.200s: gone, or another directory now", l->path);
	r->tally.left = 1;
	return 0;
}

/* The ids of a block are the caller's to act for only inside a user namespace that the caller may make again. */
static int enter_ids(struct nw_run *r, struct nw_err *e) {
	char path[64];
	if (r->launcher->privileged || r->id.uid == r->caller.uid) return 0;
	pid_t p = nwp_hold_namespace();
	if (p < 0) return nw_fail(e, NW_INTERNAL, "NW-USERNS", "no user namespace: %s; see \"nodewrap doctor\"", strerror(errno));
	int bad = nwp_write_maps(r, p, e);
	snprintf(path, sizeof path, "/proc/%d/ns/user", (int)p);
	if (!bad && (r->userns = open(path, O_RDONLY | O_CLOEXEC)) < 0) bad = nw_fail(e, NW_INTERNAL, "NW-USERNS", "%s: %s", path, strerror(errno));
	nwp_wait(p, 0);
	return bad;
}

static void rebuild(struct nw_run *r, const struct nw_run *by, const struct nw_lease *l, bool this_boot) {
	static struct nw_account account;
	struct nw_decision *d = &r->decision;
	nwp_init(r, by->launcher);
	r->guard = by->guard;
	r->leases = by->leases;
	r->role = NW_KEEPER; /* wholly root, where there is root */
	r->swept = true;
	r->why = "swept";
	memcpy(r->boot, by->boot, sizeof r->boot);
	memcpy(r->host, by->host, sizeof r->host);
	memcpy(r->run, l->run, sizeof r->run);
	r->caller.uid = l->pilot_uid, r->caller.gid = l->pilot_gid, r->caller.ppid = (pid_t)l->pilot_pid;
	account = (struct nw_account){ .uid = l->uid, .gid = l->gid, .name = l->account };
	r->id = (struct nw_identity){ l->uid, l->gid, l->inside_uid, l->inside_gid, l->size, l->first, l->has_account ? &account : NULL, -1, 0 };
	r->lease_us = l->time_us;
	r->started_us = l->starting || !this_boot ? l->time_us : 0;
	if (l->has_address) r->address = l->address;
	if (l->has_session && this_boot) r->session = l->session;
	if (l->has_init && this_boot) r->init_fd = nwp_pidfd_open((pid_t)l->init);
	if (r->init_fd >= 0 && nwp_ticks((pid_t)l->init) != l->init_ticks) nwp_close(&r->init_fd); /* the pid is another's by now */
	d->verdict = NW_PERMIT, d->mode = l->mode, d->profile = l->profile;
	d->facts = l->facts, d->files = l->files;
	memcpy(d->fact, l->fact, sizeof *l->fact * (size_t)l->facts);
	for (int i = 0; i < l->files; i++) d->file[i] = (struct nw_file){ .path = l->file[i], .temporary = true };
	if (l->has_disk) snprintf(r->disk, sizeof r->disk, "%s", l->disk);
	if (l->has_cgroup && this_boot) {
		snprintf(r->cgroup, sizeof r->cgroup, "%s", l->cgroup);
		r->cgroup_fd = nwp_open_cgroup(r);
	}
}

static int finish(const struct nw_run *by, const char *name, int fd, struct nw_err *e) {
	static struct nw_run dead;
	static struct nw_lease l;
	struct nw_run *r = &dead;
	if (read_lease(fd, &l, e) || check(by, &l, name, e)) return BROKEN;
	bool this_boot = strcmp(l.boot, by->boot) == 0;
	rebuild(r, by, &l, this_boot);
	r->lease_fd = fd;
	if ((l.has_lock && lock_ids(r, l.lock, e)) || find_work(r, &l, this_boot, e) || enter_ids(r, e)) return LEFT;
	if (nwp_finish(r, r->started_us)) return SWEPT;
	nw_fail(e, NW_INTERNAL, "NW-CLEANUP", "processes, records or the lease could not be dealt with; see \"nodewrap ps\" and the records of run %s", r->run);
	return LEFT;
}

static int sweep(const struct nw_run *by, const char *name) {
	struct nw_err e = { 0 };
	struct stat st = { 0 };
	int fd, got = take(by, name, &fd, &st, &e), state = got < 0 ? BROKEN : LIVE;
	if (got == 0 && fd < 0) return SWEPT; /* by somebody else */
	if (got > 0 && st.st_size == 0)       /* died before it had written it, that is, before it had done anything */
		state = unlinkat(by->leases, name, 0) ? (broken(&e, strerror(errno)), BROKEN) : SWEPT;
	else if (got > 0) state = finish(by, name, fd, &e);
	return report(name, state, &e);
}

/* In a process of its own, which dies with us: one that hangs (a pilot's own file system) or crashes keeps nobody else from being swept. */
static pid_t start(struct nw_run *by, const char *name) {
	pid_t us = getpid(), p = fork();
	if (p) return p;
	if (by->launcher->privileged && (setresgid(0, 0, 0) || setresuid(0, 0, 0))) _exit(LEFT);
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != us || setsid() < 0) _exit(LEFT);
	_exit(sweep(by, name));
}

/* Who waits for FUSE or a lost NFS server does not die of KILL. It is left behind, and keeps the lease's lock, so that nobody follows it. */
static bool done(pid_t p, int ms) {
	struct pollfd end = { nwp_pidfd_open(p), POLLIN, 0 };
	int status;
	bool dead = end.fd >= 0 && poll(&end, 1, ms) == 1;
	if (!dead) {
		kill(p, SIGKILL);
		dead = end.fd >= 0 && poll(&end, 1, DYING_MS) == 1;
	}
	nwp_close(&end.fd);
	/* A dead one can be waited for, if perhaps not at once: a debugger may have it first (ptrace(2)). */
	return waitpid(p, &status, dead ? 0 : WNOHANG) == p && WIFEXITED(status) && (WEXITSTATUS(status) == SWEPT || WEXITSTATUS(status) == LIVE);
}

/* Round and round. */
static struct dirent *next(DIR *d, bool *bad) {
	struct dirent *x = nwp_entry(d, bad);
	if (!x) rewinddir(d);
	return x ? x : nwp_entry(d, bad);
}

/* How many entries, and on to any one of them: a sweep with little time does not always come to the same ones first, which may be hopeless. */
static uint64_t anywhere(DIR *d, bool *bad) {
	uint64_t total = 0;
	while (nwp_entry(d, bad)) total++;
	rewinddir(d);
	for (uint64_t skip = reporting || !total ? 0 : nwp_realtime_us() % total; skip > 0; skip--) (void)readdir(d);
	return total;
}

/* All dead leases, or one; how many are left as they are. */
static int sweep_all(struct nw_run *by, const char *only, int ms) {
	uint64_t end = nwp_now_ms() + (uint64_t)ms;
	pid_t on[TOGETHER] = { 0 };
	int left = 0, n = 0;
	DIR *d = nwp_list(by->leases);
	if (!d) return 1;
	bool bad = false;
	uint64_t total = anywhere(d, &bad), at = 0;
	for (struct dirent *x; (x = at++ < total ? next(d, &bad) : NULL) || n > 0;) {
		size_t len = x ? strlen(x->d_name) : 0;
		if (x && (len != 42 || strcmp(x->d_name + 36, ".lease") || (only && strncmp(only, x->d_name, 36)))) continue;
		if (n == TOGETHER || !x) { /* room for one more, or the last ones */
			uint64_t now = nwp_now_ms();
			left += !done(on[0], reporting ? EACH_MS : now < end ? (int)(end - now) : 0);
			memmove(on, on + 1, sizeof *on * (size_t)--n);
		}
		if (x && ((!reporting && nwp_now_ms() >= end) || (on[n] = start(by, x->d_name)) < 0)) left++;
		else if (x) n++;
	}
	closedir(d);
	return left + bad; /* those that were not seen */
}

/* May there be a dead lease? Live ones cost three calls each here, and no process. Nothing is locked: the pilot may freeze us. */
static bool any_dead(const struct nw_run *by) {
	DIR *d = nwp_list(by->leases);
	bool found = !d;
	for (struct dirent *x; d && !found && (x = nwp_entry(d, &found));) {
		struct flock held = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
		int fd = strlen(x->d_name) == 42 ? openat(by->leases, x->d_name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK) : -1;
		found = fd >= 0 && (fcntl(fd, F_OFD_GETLK, &held) || held.l_type == F_UNLCK);
		nwp_close(&fd);
	}
	if (d) closedir(d);
	return found;
}

/* By a process of its own: one that hangs must not be our child when we count ours. It holds nothing of this run's pilot, and works outside
 * of the pilot's cgroup, which may be the pilot's to freeze; where there is no such place it stays. */
static void __attribute__((noreturn)) sweep_apart(struct nw_run *r) {
	char procs[NW_PATH + 16];
	snprintf(procs, sizeof procs, "%s/cgroup.procs", r->guard.cgroup);
	if (r->launcher->privileged && r->guard.cgroup[0]) nwp_write_file(procs, "0");
	nwp_close(&r->decision.status_fd);
	_exit(nwp_let_go() || sweep_all(r, NULL, BEFORE_RUN_MS) > 0);
}

int nwp_sweep_before(struct nw_run *r, struct nw_err *e) {
	r->unswept = true;
	if ((r->leases = nwp_state_dir(r, "leases", e)) < 0) return -1;
	r->unswept = r->role == NW_FRONT || any_dead(r); /* the front, which its pilot may stop, holds no lock: it knows of one */
	pid_t p = r->unswept ? fork() : -1;
	if (p == 0) sweep_apart(r);
	if (p > 0) r->unswept = nwp_wait(p, -1) != 0;
	return 0;
}

/* By whom, and as much as its lease says of it. Durable, or the lease stays. */
static int record_forgotten(const struct nw_run *by, const char *run, int fd, struct nw_err *e) {
	static struct nw_run dead;
	static struct nw_lease l;
	struct nw_err why = { 0 }, bad;
	nwp_init(&dead, by->launcher);
	dead.caller.uid = (uid_t)-1; /* the pilot: not known */
	if (fd >= 0 && read_lease(fd, &l, &bad) == 0 && strncmp(l.run, run, 36) == 0) rebuild(&dead, by, &l, false);
	dead.guard = by->guard;
	dead.role = NW_KEEPER;
	dead.swept = true;
	dead.started_us = 0;
	snprintf(dead.run, sizeof dead.run, "%.36s", run);
	memcpy(dead.boot, by->boot, sizeof dead.boot);
	memcpy(dead.host, by->host, sizeof dead.host);
	nw_fail(&why, NW_INTERNAL, "NW-LEASE", "the lease was removed by uid %u; what the run may have left was not looked at", (unsigned)getuid());
	return nwp_record(&dead, "forget", &why, true, e);
}

static int forget(struct nw_run *by, const char *run) {
	char name[48];
	struct stat st;
	snprintf(name, sizeof name, "%.36s.lease", run);
	int fd = openat(by->leases, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK); /* -1: not there, or no file that could be locked */
	bool live = fd >= 0 && flock(fd, LOCK_EX | LOCK_NB);
	struct nw_err e = { 0 };
	int state = live ? LIVE : FORGOTTEN;
	if (!live && fstatat(by->leases, name, &st, AT_SYMLINK_NOFOLLOW)) state = (broken(&e, strerror(errno)), BROKEN);
	else if (!live && record_forgotten(by, run, fd, &e)) state = LEFT;
	else if (!live && unlinkat(by->leases, name, 0)) state = (broken(&e, strerror(errno)), BROKEN);
	nwp_close(&fd); /* our process ends without it as well; a lock let go in this order is a file that is gone */
	return report(name, state, &e);
}

static int prepare(struct nw_run *by, struct nw_launcher *l, struct nw_err *e) {
	by->caller.uid = getuid();
	by->caller.env = environ;
	if (getuid() != geteuid() || getgid() != getegid())
		return nw_fail(e, NW_INTERNAL, "NW-PRIVILEGE", "nodewrap-sweep has a set-id bit; take it off, root calls it as root");
	if (nwp_load_guard(by, e)) return -1;
	l->name = nw_launcher_name(&by->guard);
	l->privileged = strcmp(l->name, "userns") != 0;
	if (l->privileged && geteuid())
		return nw_fail(e, NW_INTERNAL, "NW-PRIVILEGE", "the leases of the %s launcher are root's; sweep as root", l->name);
	return nwp_identify(by, e) || (by->leases = nwp_state_dir(by, "leases", e)) < 0 ? -1 : 0;
}

/* docs/man/nodewrap-sweep.8.md */
int nwp_sweep_main(int argc, char **argv) {
	static struct nw_run by;
	static struct nw_launcher launcher = { "userns", false }; /* until the guard has told */
	struct nw_err e = { 0 };
	bool forgetting = argc == 3 && strcmp(argv[1], "--forget") == 0, one = forgetting || (argc == 3 && strcmp(argv[1], "--run") == 0);
	nwp_init(&by, &launcher);
	umask(077);
	signal(SIGCHLD, SIG_DFL); /* ignored by who called, nobody's end could be waited for (wait(2)) */
	reporting = true;
	if (argc > 1 && (!one || strlen(argv[2]) != 36)) nw_fail(&e, NW_USAGE, "NW-USAGE", "nodewrap-sweep [--run RUN | --forget RUN]");
	else if (nwp_keep_time(&e) == 0 && prepare(&by, &launcher, &e) == 0)
		return forgetting ? forget(&by, argv[2]) != FORGOTTEN : sweep_all(&by, one ? argv[2] : NULL, 0) > 0;
	fprintf(stderr, "nodewrap: %s: %s\n", e.code, e.text);
	return e.exit;
}

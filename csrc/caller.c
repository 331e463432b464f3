/* Step 1: take nothing from the caller unseen. Everything an attacker can hand over at exec is saved or replaced here:
 * descriptors, environment, umask, working directory, signal mask and dispositions, resource limits, timer slack, parent. */
#include "run.h"

extern char **environ;

/* 0-2 must be something, or the first file we open becomes the payload's stdout (attack A02). */
static int fill_std(void) {
	for (int fd = 0; fd < 3; fd++)
		if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd) return -1;
	return 0;
}

static int take_fds(struct nw_caller *c, struct nw_err *e) {
	DIR *d = fill_std() ? NULL : opendir("/proc/self/fd");
	if (!d && errno == EMFILE) return nw_fail(e, NW_USAGE, "NW-LIMIT-FILES", "no descriptor is free: %s; raise RLIMIT_NOFILE (ulimit -n)", strerror(errno));
	if (!d) return nw_fail(e, NW_INTERNAL, "NW-PROC", "/dev/null or /proc/self/fd: %s; mount /proc, and /dev as it should be", strerror(errno));
	bool bad = false;
	for (struct dirent *x; (x = nwp_entry(d, &bad));) {
		unsigned long fd = strtoul(x->d_name, NULL, 10); /* "." and ".." are 0 */
		if (fd > 2 && fd < NW_STATUS_FDS && fd != (unsigned long)dirfd(d)) c->open[fd / 64] |= 1ull << fd % 64;
	}
	closedir(d);
	if (bad) return nw_fail(e, NW_INTERNAL, "NW-PROC", "/proc/self/fd cannot be read: %s", strerror(errno));
	if (close_range(NW_STATUS_FDS, ~0u, 0) || close_range(3, ~0u, CLOSE_RANGE_CLOEXEC))
		return nw_fail(e, NW_INTERNAL, "NW-KERNEL", "close_range(2): %s; nodewrap needs Linux 5.12 or newer", strerror(errno));
	return 0;
}

/* Once it is known which one is wanted: the rest of what the caller gave us, so that no process of ours keeps a pipe of the pilot's open
 * (HTCondor's starter hung on that under glexec). Ours never have these numbers: they were taken when ours were opened. */
void nwp_close_callers(struct nw_caller *c, int keep) {
	for (int fd = 3; fd < NW_STATUS_FDS; fd++)
		if (fd != keep && c->open[fd / 64] & 1ull << fd % 64) close(fd);
}

/* By the kernel's own call: C libraries keep some for themselves (glibc 32 and 33, musl 34 too, which is glibc's SIGRTMIN), and would let a payload be
 * started with those ignored. */
static int all_default(void) {
	const struct { void *handler; unsigned long flags; void *restorer; uint64_t mask; } dfl = { 0 };
	for (int s = 1; s < _NSIG; s++)
		if (s != SIGKILL && s != SIGSTOP && syscall(SYS_rt_sigaction, s, &dfl, NULL, sizeof dfl.mask)) return -1;
	return 0;
}

static int take_signals(struct nw_err *e) {
	struct sigaction ign = { .sa_handler = SIG_IGN };
	const sigset_t all = nwp_all_signals();
	/* A record cut by a reader's death or a size limit must be an error we see, not our death. */
	if (all_default() || sigaction(SIGPIPE, &ign, NULL) || sigaction(SIGXFSZ, &ign, NULL) || sigprocmask(SIG_SETMASK, &all, NULL))
		return nw_fail(e, NW_INTERNAL, "NW-SIGNALS", "cannot set signals: %s", strerror(errno));
	return 0;
}

static void widen(int resource, rlim_t want) {
	struct rlimit l;
	if (getrlimit(resource, &l) || (l.rlim_cur >= want && want != RLIM_INFINITY)) return;
	if (l.rlim_max != RLIM_INFINITY && (want == RLIM_INFINITY || l.rlim_max < want)) {
		struct rlimit more = { want, want };
		if (setrlimit(resource, &more) == 0) return; /* needs CAP_SYS_RESOURCE */
	}
	l.rlim_cur = l.rlim_max;
	setrlimit(resource, &l); /* lowering to the hard limit cannot fail; what is too little is found below */
}

/* Limits that would break us half-way are refused before anything is done (attacks A08, A09). */
static int take_limits(struct nw_caller *c, struct nw_err *e) {
	static const struct {
		int resource;
		rlim_t need;
		const char *name;
	} floor[] = {
		{ RLIMIT_NOFILE, 64, "RLIMIT_NOFILE (ulimit -n)" },
		{ RLIMIT_FSIZE, 1 << 20, "RLIMIT_FSIZE (ulimit -f)" },
		{ RLIMIT_AS, 256 << 20, "RLIMIT_AS (ulimit -v)" },
		{ RLIMIT_DATA, 64 << 20, "RLIMIT_DATA (ulimit -d)" },
		{ RLIMIT_STACK, 256 << 10, "RLIMIT_STACK (ulimit -s)" },
		{ RLIMIT_CPU, 5, "RLIMIT_CPU (ulimit -t)" },
		{ RLIMIT_NPROC, 16, "RLIMIT_NPROC (ulimit -u)" }, /* the end of the payload's processes is proved by a fork under its uid */
	};
	struct rlimit l;
	for (int i = 0; i < RLIM_NLIMITS; i++)
		if (getrlimit(i, &c->limit[i])) return nw_fail(e, NW_INTERNAL, "NW-KERNEL", "getrlimit %d: %s", i, strerror(errno));
	for (size_t i = 0; i < sizeof floor / sizeof *floor; i++) {
		widen(floor[i].resource, floor[i].resource == RLIMIT_STACK ? floor[i].need : RLIM_INFINITY);
		if (getrlimit(floor[i].resource, &l) == 0 && l.rlim_cur < floor[i].need)
			return nw_fail(e, NW_USAGE, "NW-LIMIT", "%s is %llu, nodewrap needs %llu to record and clean up; raise it for the pilot",
				floor[i].name, (unsigned long long)l.rlim_cur, (unsigned long long)floor[i].need);
	}
	/* No core with credentials in it. The hard limit stays: the payload, which may have cores, could not raise it again. */
	if (setrlimit(RLIMIT_CORE, &(struct rlimit){ 0, c->limit[RLIMIT_CORE].rlim_max }))
		return nw_fail(e, NW_INTERNAL, "NW-KERNEL", "setrlimit RLIMIT_CORE: %s", strerror(errno));
	return 0;
}

static int take_ids(struct nw_run *r, struct nw_err *e) {
	struct nw_caller *c = &r->caller;
	uid_t euid, suid;
	gid_t egid, sgid;
	char map[128] = "";
	int fd;
	if (getresuid(&c->uid, &euid, &suid) || getresgid(&c->gid, &egid, &sgid))
		return nw_fail(e, NW_INTERNAL, "NW-KERNEL", "getresuid: %s", strerror(errno));
	c->groups = getgroups(NW_CALLER_GROUPS, c->group);
	if (c->groups < 0) return nw_fail(e, NW_USAGE, "NW-GROUPS", "the caller is in more than %d groups", NW_CALLER_GROUPS);
	if ((fd = open("/proc/self/uid_map", O_RDONLY | O_CLOEXEC)) < 0 || read(fd, map, sizeof map - 1) < 0)
		return nw_fail(e, NW_INTERNAL, "NW-PROC", "/proc/self/uid_map: %s; mount /proc", strerror(errno));
	close(fd);
	unsigned long inside = 1, outside = 1, count = 0;
	bool initial = sscanf(map, "%lu %lu %lu", &inside, &outside, &count) == 3 && inside == 0 && outside == 0 && count == 4294967295ul;
	if (!r->launcher->privileged) {
		if (euid != c->uid || egid != c->gid || (initial && euid == 0))
			return nw_fail(e, NW_INTERNAL, "NW-PRIVILEGE",
				"the userns launcher refuses to run with privilege (uid %u, euid %u); use the setuid launcher or another account",
				c->uid, euid);
		return 0;
	}
	if (euid != 0 || !initial)
		return nw_fail(e, NW_INTERNAL, "NW-PRIVILEGE",
			"the %s launcher is not root in the initial user namespace: setuid bit lost, nosuid mount, no_new_privs, or inside a "
			"container; see \"nodewrap doctor\"",
			r->launcher->name);
	if (c->uid == 0) return nw_fail(e, NW_DENIED, "NW-CALLER", "root is not a pilot account; call nodewrap as one");
	/* What we create is root's; the real ids stay the pilot's, which may signal us. Securebits could keep our rights with the caller's fsuid. */
	if (setresgid((gid_t)-1, 0, (gid_t)-1) || prctl(PR_SET_SECUREBITS, 0))
		return nw_fail(e, NW_INTERNAL, "NW-KERNEL", "setresgid: %s", strerror(errno));
	return 0;
}

/* Whoever waits is woken as late as his timer slack allows (prctl(2)). The pilot's comes to us through exec, set-id bits or not, and goes on to what we
 * start: with 30 years of it no limit would be held in time. The kernel's default (init/init_task.c); 0 would mean what we were started with. */
int nwp_keep_time(struct nw_err *e) {
	return prctl(PR_SET_TIMERSLACK, 50000ul) ? nw_fail(e, NW_INTERNAL, "NW-KERNEL", "prctl PR_SET_TIMERSLACK: %s", strerror(errno)) : 0;
}

/* The name of this run: UUIDv7 (RFC 9562 5.7), so that names sort by time. */
static int name_run(struct nw_run *r, struct nw_err *e) {
	unsigned char b[16];
	uint64_t ms = nwp_realtime_us() / 1000;
	if (getrandom(b, sizeof b, 0) != sizeof b) return nw_fail(e, NW_INTERNAL, "NW-KERNEL", "getrandom: %s", strerror(errno));
	for (int i = 0; i < 6; i++) b[i] = (unsigned char)(ms >> (40 - 8 * i));
	b[6] = 0x70 | (b[6] & 0x0f);
	b[8] = 0x80 | (b[8] & 0x3f);
	snprintf(r->run, sizeof r->run, "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1], b[2], b[3], b[4], b[5],
		b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]);
	return 0;
}

/* Without the boot id a lease could not be told from one of before a reboot, whose processes nobody has to end. */
int nwp_identify(struct nw_run *r, struct nw_err *e) {
	struct utsname u;
	int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
	bool known = fd >= 0 && read(fd, r->boot, 36) == 36;
	nwp_close(&fd);
	if (uname(&u) == 0) snprintf(r->host, sizeof r->host, "%.64s", u.nodename);
	return known ? 0 : nw_fail(e, NW_INTERNAL, "NW-KERNEL", "/proc/sys/kernel/random/boot_id cannot be read: %s", strerror(errno));
}

/* Which process the pilot is: a pidfd, so that a thread's exit or a reused pid cannot mislead us (attacks A29, A30). */
static void take_parent(struct nw_caller *c) {
	c->ppid = getppid();
	c->parent = c->ppid > 1 ? nwp_pidfd_open(c->ppid) : -1;
	if (c->parent >= 0 && getppid() != c->ppid) nwp_close(&c->parent); /* it died in between, and this pid may be somebody else's */
}

int nwp_sanitise(struct nw_run *r, int argc, char **argv, struct nw_err *e) {
	static char *nothing[] = { NULL };
	struct nw_caller *c = &r->caller;
	c->argc = argc;
	c->argv = argv;
	c->env = environ;
	for (c->envc = 0; c->env[c->envc]; c->envc++)
		;
	environ = nothing;
	c->umask = umask(077);
	personality(PER_LINUX); /* "setarch -R" is not for the payload; a filter around us that refuses has its own reason */
	/* Without privilege there is nothing to hide from the caller, and the kernel wants a dumpable process to write id maps for. */
	if (nwp_keep_time(e) || take_limits(c, e) || take_fds(c, e) || take_signals(e) || (r->launcher->privileged && prctl(PR_SET_DUMPABLE, 0)) ||
		take_ids(r, e) || name_run(r, e))
		return e->exit ? -1 : nw_fail(e, NW_INTERNAL, "NW-KERNEL", "prctl: %s", strerror(errno));
	if (argc < 1) return nw_fail(e, NW_USAGE, "NW-USAGE", "started without a name (argc is 0)");
	if (!getcwd(c->cwd, sizeof c->cwd) || c->cwd[0] != '/') c->cwd[0] = 0;
	take_parent(c);
	if (nwp_identify(r, e)) return -1;
	if (chdir("/")) return nw_fail(e, NW_INTERNAL, "NW-KERNEL", "chdir /: %s", strerror(errno));
	return 0;
}

/* Only saves time: a wrong guess makes the child refuse what it would have to load late. No option is parsed here. */
bool nw_wants_credentials(int argc, char *const *argv, char *const *env) {
	static const char option[] = "--credential", variable[] = "GLEXEC_CLIENT_CERT=";
	for (int i = 1; i < argc && strcmp(argv[i], "--"); i++)
		if (strncmp(argv[i], option, sizeof option - 1) == 0) return true;
	for (; *env; env++)
		if (strncmp(*env, variable, sizeof variable - 1) == 0) return true;
	return false;
}

int nwp_build_request(struct nw_run *r, struct nw_buf *b, struct nw_err *e) {
	struct nw_caller *c = &r->caller;
	nw_frame_begin(b, NW_REQUEST_MAX);
	nw_put_int(b, 1, 1);
	nw_put_string(b, 2, r->launcher->name);
	nw_put_int(b, 3, c->uid);
	nw_put_int(b, 4, c->gid);
	for (int i = 0; i < c->groups; i++) nw_put_int(b, 5, c->group[i]);
	nw_put_int(b, 6, (uint64_t)getpid());
	nw_put_int(b, 7, (uint64_t)c->ppid);
	nw_put_string(b, 8, c->cwd);
	nw_put_int(b, 9, c->umask);
	for (int i = 0; i < c->argc; i++) nw_put_string(b, 10, c->argv[i]);
	for (int i = 0; i < c->envc; i++) nw_put_string(b, 11, c->env[i]);
	nw_put_string(b, 12, r->host);
	nw_put_string(b, 13, r->boot);
	nw_put_int(b, 14, nwp_realtime_us());
	nw_put_string(b, 15, r->run);
	if (nw_frame_end(b, NW_REQUEST))
		return nw_fail(e, NW_USAGE, "NW-REQUEST-SIZE", "arguments and environment exceed %u MiB; make them smaller", NW_REQUEST_MAX >> 20);
	return 0;
}

/* File-system ids of the caller; the kernel takes CAP_DAC_* and the like away with them (capabilities(7)). setfsuid(2) reports
 * nothing, so the change is read back. The caller's supplementary groups are still ours. */
int nwp_as_caller(const struct nw_run *r, bool on) {
	uid_t uid = on ? r->caller.uid : 0;
	gid_t gid = on ? r->caller.gid : getegid();
	if (!r->launcher->privileged) return 0;
	setfsgid(gid);
	setfsuid(uid);
	if ((uid_t)setfsuid((uid_t)-1) == uid && (gid_t)setfsgid((gid_t)-1) == gid) return 0;
	errno = EPERM;
	if (!on) nwp_lost_ids();
	return -1;
}

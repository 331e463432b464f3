/* Step 6: init in its namespaces. Init is the payload's parent and its namespace's end: when it dies, the kernel kills all the rest
 * (pid_namespaces(7)). It holds none of the pilot's descriptors, no capability, and dies with the launcher. */
#include "run.h"

#define GO_MS 5000 /* more than an exec takes whose file is there */

int nwp_degrade(struct nw_run *r, const char *what, struct nw_err *e) {
	if (!r->profile.degrade)
		return nw_fail(e, NW_INTERNAL, "NW-MISSING",
			"this node cannot give \"%s\", and profile %s says on-missing = \"refuse\"; see \"nodewrap doctor\"", what, r->profile.name);
	if (r->degrades < NW_DEGRADES) r->degrade[r->degrades++] = what;
	return 0;
}

/* A group with processes in it hands no memory or io down (cgroups(7), "no internal processes"), and the pilot is in its own. Where the one
 * above was delegated to it, as systemd and batch systems do for pilots that make groups, the run gets its place beside it. */
static void go_beside(const struct nw_run *r, char *at) {
	char path[512 + NW_PATH], *slash = strrchr(at, '/');
	struct stat st;
	if (!nwp_wants_cgroup(&r->decision) || r->caller.uid == 0 || !slash) return;
	snprintf(path, sizeof path, "%s%.*s", r->guard.cgroup, (int)(slash - at), at);
	if (stat(path, &st) == 0 && st.st_uid == r->caller.uid) *slash = 0;
}

/* The run's own cgroup, below the caller's: the batch system's limits and accounting go on to hold (I15). Only its name: the lease is first. */
int nwp_cgroup_path(struct nw_run *r, struct nw_err *e) {
	char *line = NULL, *at;
	size_t size = 0;
	ssize_t n = 0;
	if (!r->guard.cgroup[0]) return 0;
	FILE *f = fopen("/proc/self/cgroup", "re");
	/* Whole lines: those of the other hierarchies have names that the pilot may have chosen. */
	while (f && (n = getline(&line, &size, f)) > 0 && strncmp(line, "0::/", 4))
		;
	if (f) fclose(f);
	bool fits = f && n > 4 && n < 512 && line[n - 1] == '\n';
	at = fits ? line + 3 : NULL;
	if (fits) line[n - 1] = 0;
	if (fits && !at[1]) *at = 0; /* the top itself */
	if (fits) go_beside(r, at);
	fits = fits && snprintf(r->cgroup, sizeof r->cgroup, "%s%s/nodewrap-%s", r->guard.cgroup, at, r->run) < (int)sizeof r->cgroup;
	free(line);
	if (fits && !strstr(r->cgroup, "/..") && nw_lease_holds(r->cgroup)) return 0; /* a name that a sweep would not take is no use */
	r->cgroup[0] = 0;
	return nwp_degrade(r, "cgroup", e);
}

/* -1 with ENOENT: it is gone. What has its name may be the pilot's: of an empty group, where the one above is its own, it can take the place. */
int nwp_open_cgroup(const struct nw_run *r) {
	int fd = open(r->cgroup, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	struct stat st;
	if (fd >= 0 && (fstat(fd, &st) || st.st_uid != geteuid())) {
		nwp_close(&fd);
		errno = ENOENT;
	}
	return fd;
}

static int make_cgroup(struct nw_run *r, struct nw_err *e) {
	bool made = r->cgroup[0] && mkdir(r->cgroup, 0755) == 0;
	if (made) r->cgroup_fd = nwp_open_cgroup(r);
	if (!r->cgroup[0] || r->cgroup_fd >= 0) return 0;
	if (made) rmdir(r->cgroup);
	r->cgroup[0] = 0;
	return nwp_degrade(r, "cgroup", e);
}

static int landlock_check(struct nw_run *r, struct nw_err *e) {
	static const struct {
		unsigned bit;
		int abi; /* from Linux 5.19, 6.7, 6.12. Before ABI 2 nothing may be renamed to another directory, which payloads need */
		const char *what;
	} needs[] = { { NW_LANDLOCK_FILES, 2, "landlock-files" }, { NW_LANDLOCK_TCP, 4, "landlock-tcp" }, { NW_LANDLOCK_ABSTRACT, 6, "landlock-abstract" },
		{ NW_LANDLOCK_SIGNALS, 6, "landlock-signals" } };
	struct nw_profile *p = &r->profile;
	if (p->landlock) r->landlock = (int)syscall(SYS_landlock_create_ruleset, NULL, 0, 1);
	for (size_t i = 0; i < sizeof needs / sizeof *needs; i++) {
		if (!(p->landlock & needs[i].bit) || r->landlock >= needs[i].abi) continue;
		p->landlock &= ~needs[i].bit;
		/* abstract sockets belong to the network namespace (unix(7)): closed anyway */
		if (needs[i].bit == NW_LANDLOCK_ABSTRACT && p->namespaces & NW_NS_NET) continue;
		if (!(p->landlock_optional & needs[i].bit) && !p->degrade) return nwp_degrade(r, needs[i].what, e);
		if (r->degrades < NW_DEGRADES) r->degrade[r->degrades++] = needs[i].what;
	}
	return 0;
}

/* End and count what the payload left. kill(-1) from pid 1 reaches all of the namespace and nobody else, and at once: a fork waits for the
 * same lock (kernel/signal.c, fork.c). Killed before counted: among 2,000 processes that fork, a count comes too late. What does not die
 * in time (uninterruptible sleep) is the launcher's to report: the namespace ends with us. */
static int end_others(void) {
	uint64_t deadline = nwp_now_ms() + 5000;
	int status, killed = 0;
	pid_t p;
	if (getpid() != 1) return 0; /* no namespace of our own: kill(-1) would be everybody */
	kill(-1, SIGKILL);
	while ((p = waitpid(-1, &status, WNOHANG)) >= 0 && nwp_now_ms() < deadline) {
		killed += p > 0 && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
		if (p == 0) usleep(200);
	}
	return killed;
}

static void __attribute__((noreturn)) reap(int sock, pid_t payload) {
	struct nw_msg m = { .what = NW_NEWS_EXIT };
	pid_t p;
	for (;;) {
		p = waitpid(-1, &m.status, 0);
		if (p > 0 && WIFSTOPPED(m.status)) { /* it has made us its tracer (PTRACE_TRACEME); who is stopped otherwise is not told of here */
			int sig = WSTOPSIG(m.status);
			ptrace(PTRACE_DETACH, p, NULL, (void *)(uintptr_t)(sig == SIGTRAP ? 0 : sig)); /* fails for who was killed meanwhile */
			continue;
		}
		if (p == payload) break;
		if (p < 0 && errno != EINTR) _exit(124);
	}
	m.killed = end_others();
	_exit(nwp_write_all(sock, &m, sizeof m) != 0);
}

/* The payload, until its root is built (nwp_payload), waits at the other end of built. */
static pid_t clone_payload(struct nw_run *r, int payload_sock, const int *built, const void *filter, size_t len) {
	bool map = r->launcher->privileged && r->decision.mode == NW_MAP;
	r->init = getpid(); /* as the payload sees it */
	pid_t p = nwp_set_groups(r) ? -1 : (pid_t)syscall(SYS_clone, SIGCHLD | (map ? CLONE_NEWUSER : 0), 0, 0, 0, 0);
	if (p) return p;
	close(built[1]);
	nwp_payload(r, payload_sock, built[0], filter, len);
}

static void __attribute__((noreturn)) be_init(struct nw_run *r, int sock, int payload_sock, const void *filter, size_t len) {
	struct nw_msg m = { .what = NW_NEWS_ERROR };
	int built[2];
	char go;
	pid_t p = -1;
	bool bad = false;
	/* Real root keeps the pilot from signalling init; without privilege init is root, or the one mapped id, of its namespace. */
	if (r->launcher->privileged && (setresgid(0, 0, 0) || setresuid(0, 0, 0))) _exit(124);
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || prctl(PR_SET_NAME, "nodewrap-init")) _exit(124);
	if (r->netns >= 0 && setns(r->netns, CLONE_NEWNET))
		bad = nw_fail(&m.err, NW_INTERNAL, "NW-NAMESPACE", "init cannot enter its network: %s", strerror(errno));
	bad = bad || nwp_open_inside(r, &m.err);
	if (!bad && (pipe2(built, O_CLOEXEC) || (p = clone_payload(r, payload_sock, built, filter, len)) < 0))
		bad = nw_fail(&m.err, NW_INTERNAL, "NW-INIT", "no process for the payload: %s", strerror(errno));
	/* The launcher's word, or it is gone: it comes when our ids are mapped, for which we are dumpable until then. Also before we give up: of a socket
	 * that is closed with something unread the other side gets ECONNRESET first (net/unix/af_unix.c). */
	if (read(sock, &go, 1) != 1) _exit(124);
	if (!bad && prctl(PR_SET_DUMPABLE, 0)) bad = nw_fail(&m.err, NW_INTERNAL, "NW-INIT", "init: %s", strerror(errno));
	if (bad || nwp_build_root(r, &m.err)) {
		nwp_write_all(sock, &m, sizeof m);
		_exit(124);
	}
	if (write(built[1], "", 1) != 1) _exit(124);
	nwp_forget_files(r);
	int null = open("/dev/null", O_RDWR | O_CLOEXEC), high = fcntl(sock, F_DUPFD_CLOEXEC, 10);
	if (null < 0 || high < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0 || dup2(high, 3) < 0 ||
		close_range(4, ~0u, 0)) {
		nw_fail(&m.err, NW_INTERNAL, "NW-INIT", "init: %s", strerror(errno));
		nwp_write_all(sock, &m, sizeof m);
		_exit(124);
	}
	/* Without a namespace that dies with us the payload's parent-death signal is ours to send, across ids, and orphans ours to reap. */
	if (!(r->profile.namespaces & NW_NS_PID) && prctl(PR_SET_CHILD_SUBREAPER, 1)) _exit(124);
	bool ours = r->launcher->privileged || r->decision.mode == NW_MAP || r->profile.namespaces; /* else there is no capability to keep */
	if (nwp_drop_bounding() || nwp_keep_caps(ours ? 1ull << CAP_KILL : 0)) _exit(124);
	reap(3, p);
}

static uint64_t clone_flags(const struct nw_run *r) {
	static const uint64_t flag[] = { CLONE_NEWPID, CLONE_NEWIPC, CLONE_NEWUTS, CLONE_NEWCGROUP, CLONE_NEWNS, CLONE_NEWNET };
	uint64_t flags = !r->launcher->privileged && (r->profile.namespaces || r->decision.mode == NW_MAP) ? CLONE_NEWUSER : 0;
	for (int i = 0; i < 6; i++)
		if (r->profile.namespaces & 1u << i) flags |= flag[i];
	return r->netns < 0 ? flags : flags & ~(uint64_t)CLONE_NEWNET;
}

static int clone_init(struct nw_run *r, const void *filter, size_t len, struct nw_err *e) {
	struct clone_args a = { .flags = clone_flags(r) | CLONE_PIDFD, .exit_signal = SIGCHLD, .pidfd = (uint64_t)(uintptr_t)&r->init_fd };
	int init[2], payload[2], on = 1;
	char path[64];
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, init) || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, payload) ||
		setsockopt(payload[0], SOL_SOCKET, SO_PASSCRED, &on, sizeof on))
		return nw_fail(e, NW_INTERNAL, "NW-INIT", "socketpair: %s", strerror(errno));
	if (r->cgroup_fd >= 0) {
		a.flags |= CLONE_INTO_CGROUP;
		a.cgroup = (uint64_t)r->cgroup_fd;
	}
	r->init = (pid_t)syscall(SYS_clone3, &a, sizeof a);
	/* A filter that cannot look behind the pointer says so (ours does); the old call knows all but the cgroup. */
	if (r->init < 0 && errno == ENOSYS && r->cgroup_fd < 0) r->init = (pid_t)syscall(SYS_clone, a.flags | SIGCHLD, 0, &r->init_fd, 0, 0);
	if (r->init == 0) {
		close(init[0]);
		close(payload[0]);
		be_init(r, init[1], payload[1], filter, len);
	}
	close(init[1]);
	close(payload[1]);
	r->init_sock = init[0];
	r->payload_sock = payload[0];
	nwp_close(&r->netns); /* it ends with the payload */
	if (r->init < 0)
		return nw_fail(e, NW_INTERNAL, "NW-NAMESPACE", "the kernel refused the namespaces of profile %s: %s; see \"nodewrap doctor\"",
			r->profile.name, strerror(errno));
	if (!(a.flags & CLONE_NEWUSER)) return 0;
	snprintf(path, sizeof path, "/proc/%d/ns/user", (int)r->init);
	if ((r->userns = open(path, O_RDONLY | O_CLOEXEC)) < 0) return nw_fail(e, NW_INTERNAL, "NW-USERNS", "%s: %s", path, strerror(errno));
	return nwp_write_maps(r, r->init, e);
}

/* The next word: that init could not do its part, else the payload's, which when it has given up says why, where init only says that it ended. Of an
 * init that has ended both are at their end. With the payload's first comes a pidfd: it may have waited here while who sent it ended, and its
 * number is another's by now. */
static int news(struct nw_run *r, struct nw_msg *m, struct nw_err *e) {
	struct pollfd p[2] = { { r->payload_sock, POLLIN, 0 }, { r->init_sock, POLLIN, 0 } };
	while (poll(p, 2, 30000) < 0 && errno == EINTR)
		;
	ssize_t n = p[1].revents ? recv(r->init_sock, m, sizeof *m, MSG_DONTWAIT | MSG_PEEK) : -1; /* the payload's end is for supervise.c to read */
	bool failed = n == (ssize_t)sizeof *m && m->what == NW_NEWS_ERROR;
	if (!failed && p[0].revents & POLLIN) n = nwp_receive_fd(r->payload_sock, m, sizeof *m, MSG_DONTWAIT, &r->payload, &r->payload_fd);
	if (n != (ssize_t)sizeof *m)
		return nw_fail(e, NW_INTERNAL, "NW-INIT", "init ended or hung before the payload was ready (killed from outside, or out of memory)");
	if (m->what == NW_NEWS_ERROR) {
		m->err.code[sizeof m->err.code - 1] = m->err.text[sizeof m->err.text - 1] = 0;
		return nw_fail(e, m->err.exit, m->err.code, "%s", m->err.text);
	}
	return 0;
}

static int say(int sock) {
	return send(sock, "", 1, MSG_NOSIGNAL) == 1 ? 0 : -1;
}

/* The kernel gives each login a number that all its descendants keep (audit(7)): the payload's, since it has set its loginuid. */
static uint32_t read_session(pid_t pid) {
	char path[64], text[16] = "";
	snprintf(path, sizeof path, "/proc/%d/sessionid", (int)pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
	nwp_close(&fd);
	return n > 0 ? (uint32_t)strtoul(text, NULL, 10) : AUDIT_SID_UNSET;
}

static int killed(struct nw_err *e) {
	return nw_fail(e, NW_INTERNAL, "NW-INIT", "the payload was killed before it began");
}

/* What failed with it, when it is gone: an init that gave up says why. */
static int lost_payload(struct nw_run *r, struct nw_err *e) {
	struct nw_msg m;
	return !nwp_is_reaped(r->payload_fd) || news(r, &m, e) ? -1 : killed(e);
}

static int until_ready(struct nw_run *r, struct nw_err *e) {
	struct nw_msg m = { 0 };
	bool map = r->launcher->privileged && r->decision.mode == NW_MAP;
	do {
		if (news(r, &m, e)) return -1;
		if (r->payload_fd < 0) return nw_fail(e, NW_INTERNAL, "NW-INIT", "the payload's pidfd did not come: no descriptor is free");
		if (map && m.what == NW_NEWS_BORN && (nwp_write_maps(r, r->payload, e) || (say(r->payload_sock) && killed(e)))) return lost_payload(r, e);
	} while (m.what != NW_NEWS_READY);
	r->loginuid = m.loginuid;
	r->keyring = m.keyring;
	if (r->loginuid && !(r->profile.namespaces & NW_NS_PID)) r->session = read_session(r->payload);
	if (nwp_is_reaped(r->payload_fd)) { /* then that may have been another's */
		r->session = AUDIT_SID_UNSET;
		killed(e);
		return lost_payload(r, e);
	}
	return r->keyring || !r->profile.namespaces ? 0 : nwp_degrade(r, "session-keyring", e);
}

int nwp_start(struct nw_run *r, struct nw_err *e) {
	void *filter = NULL;
	size_t len = 0;
	int bad;
	if (r->profile.seccomp[0] && nwp_policy_file(r, r->profile.seccomp, &filter, &len, e)) return -1;
	if (prctl(PR_SET_CHILD_SUBREAPER, 1)) return nw_fail(e, NW_INTERNAL, "NW-KERNEL", "prctl: %s", strerror(errno));
	bad = landlock_check(r, e) || nwp_network(r, e) || make_cgroup(r, e) || nwp_hold_limits(r, e) || nwp_container(r, e) ||
	      clone_init(r, filter, len, e) || nwp_network(r, e);
	free(filter);
	nwp_forget_files(r);
	if (bad) return e->exit ? -1 : nw_fail(e, NW_INTERNAL, "NW-STDIO", "cannot arrange stdin, stdout, stderr: %s", strerror(errno));
	if (nwp_give_work(r)) return nw_fail(e, NW_INTERNAL, "NW-WORKDIR", "%s: cannot be given to the payload", r->work.path);
	if (say(r->init_sock)) return until_ready(r, e); /* it is gone: the news are why */
	/* While init builds the root. */
	return nwp_record(r, "authorize", NULL, false, e) ? -1 : until_ready(r, e);
}

/* What it gave up for, perhaps before it read our word: then there is ECONNRESET first, and once (net/unix/af_unix.c, unix_release_sock). */
int nwp_gave_up(struct nw_run *r, struct nw_err *e) {
	struct nw_msg m;
	ssize_t n;
	do n = recv(r->payload_sock, &m, sizeof m, MSG_DONTWAIT);
	while (n < 0 && (errno == ECONNRESET || errno == EINTR));
	nwp_close(&r->payload_sock);
	if (n != (ssize_t)sizeof m || m.what != NW_NEWS_ERROR) return 0;
	m.err.code[sizeof m.err.code - 1] = m.err.text[sizeof m.err.text - 1] = 0;
	return nw_fail(e, m.err.exit, m.err.code, "%s", m.err.text);
}

/* The records are safe: let it exec, which closes its socket; or it says why not (126, 127). Who has its id may have stopped it, and its file's
 * server may not answer: then, or when the front is killed, it counts as begun, with all its limits, and why not is told at its end. */
int nwp_go(struct nw_run *r, struct nw_err *e) {
	struct pollfd p[2] = { { r->payload_sock, POLLIN, 0 }, { r->front, 0, 0 } };
	r->started_us = nwp_realtime_us();
	int gone = say(r->payload_sock);
	if (!gone && (poll(p, 2, GO_MS) < 1 || !p[0].revents)) return 0;
	return nwp_gave_up(r, e) ? -1 : gone ? killed(e) : 0;
}

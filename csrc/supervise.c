/* Step 7: watch the payload, its limits, the pilot, and carry what could not be handed over as it was. */
#include "run.h"

#define LOOK_MS 200

struct relay {
	int from, to;
}; /* from -1: done */

static struct relay relays[3];
static bool suspended; /* the payload, with the front */

/* A file, terminal or device handed over could be reopened through /proc/self/fd with more than it carries (a log read, a terminal
 * typed into). Pipes and sockets cannot give more; /dev/null has nothing to give. */
static bool harmless(int fd, struct stat *st) {
	return fstat(fd, st) == 0 && (S_ISFIFO(st->st_mode) || S_ISSOCK(st->st_mode) || (S_ISCHR(st->st_mode) && st->st_rdev == makedev(1, 3)));
}

static int relay(struct nw_run *r, int fd) {
	int p[2], mine = fd == 0 ? 1 : 0;
	if (pipe2(p, O_CLOEXEC)) return -1;
	/* The payload may open /dev/stdout again, whatever its id: its own pipe is its own. Only who may trace a holder finds it in /proc. */
	if (fchmod(p[0], 0666)) return -1;
	r->std[fd] = p[!mine];
	relays[fd] = fd == 0 ? (struct relay){ 0, p[1] } : (struct relay){ p[0], fd };
	return fcntl(p[mine], F_SETFL, fd == 0 ? O_NONBLOCK : 0);
}

int nwp_relay_open(struct nw_run *r) {
	struct stat st, out;
	for (int fd = 0; fd < 3; fd++) {
		relays[fd] = (struct relay){ -1, -1 };
		r->std[fd] = fd;
		if (harmless(fd, &st) || !(r->profile.namespaces & NW_NS_MOUNT)) continue;
		/* stdout and stderr on one file: one pipe, so that the order of lines stays */
		if (fd == 2 && r->std[1] != 1 && fstat(1, &out) == 0 && out.st_dev == st.st_dev && out.st_ino == st.st_ino) r->std[2] = r->std[1];
		else if (relay(r, fd)) return -1;
	}
	return 0;
}

void nwp_close_payload_ends(struct nw_run *r) {
	for (int fd = 0; fd < 3; fd++)
		if (r->std[fd] > 2 && !(fd == 2 && r->std[2] == r->std[1])) close(r->std[fd]);
}

static void stop_relay(struct relay *x) {
	if (x->from > 2) close(x->from);
	if (x->to > 2) close(x->to); /* the payload sees the end of its stdin */
	x->from = x->to = -1;
}

/* Output is written whole: files and terminals take it at once. */
static int carry_out(struct relay *x) {
	char buffer[65536];
	ssize_t n = read(x->from, buffer, sizeof buffer);
	if (n < 0 && errno == EINTR) return 0;
	if (n <= 0 || nwp_write_all(x->to, buffer, (size_t)n)) stop_relay(x); /* nobody takes it: the payload gets SIGPIPE, as it would have */
	return (int)n;
}

/* Input goes on only as fast as the payload reads: what its pipe did not take is held. */
static struct {
	char bytes[65536];
	size_t at, n;
} held;

static void carry_in(struct relay *x) {
	ssize_t n = held.n ? 1 : read(x->from, held.bytes, sizeof held.bytes);
	if (n < 0 && (errno == EINTR || errno == EAGAIN)) return;
	if (n <= 0) {
		stop_relay(x);
		return;
	}
	if (!held.n) held.n = (size_t)n, held.at = 0;
	n = write(x->to, held.bytes + held.at, held.n);
	if (n < 0 && errno != EAGAIN && errno != EINTR) stop_relay(x);
	if (n > 0) held.at += (size_t)n, held.n -= (size_t)n;
}

int nwp_cgroup(const struct nw_run *r, const char *file, const char *text) {
	int fd = r->cgroup_fd < 0 ? -1 : openat(r->cgroup_fd, file, O_WRONLY | O_CLOEXEC), bad = fd < 0 || write(fd, text, 1) != 1;
	nwp_close(&fd);
	return -bad;
}

static void kill_all(struct nw_run *r, const char *why) {
	if (!r->why) r->why = why;
	nwp_cgroup(r, "cgroup.kill", "1"); /* at once: among 2,000 processes that fork, init's own death waits for its turn */
	if (nwp_pidfd_signal(r->init_fd, SIGKILL)) return; /* already gone */
	nwp_pidfd_signal(r->payload_fd, SIGKILL);
}

/* From within the payload's pid namespace, whoever there is. (To enter one by pidfd takes what only real root has over init.) */
static int signal_namespace(const struct nw_run *r, int sig) {
	pid_t p = fork();
	if (p == 0) {
		if (setns(r->init_fd, CLONE_NEWPID) || (p = fork()) < 0) _exit(1);
		/* A parent outside one's own namespace is nobody: so this is the payload's, and everybody in it is all that kill(-1) reaches. */
		_exit(p > 0 ? nwp_wait(p, 1000) != 0 : getppid() != 0 || kill(-1, sig));
	}
	return p > 0 ? nwp_wait(p, 2000) : -1;
}

/* SIGSTOP or SIGCONT for the whole payload. By its cgroup the payload does not see it and cannot undo it; without any of the two it is for
 * its process group, in which the shells of batch jobs leave what they start. */
static void hold(const struct nw_run *r, int sig) {
	if (nwp_cgroup(r, "cgroup.freeze", sig == SIGSTOP ? "1" : "0") == 0) return;
	if (r->launcher->privileged && r->profile.namespaces & NW_NS_PID && signal_namespace(r, sig) == 0) return;
	if (nwp_pidfd_signal(r->payload_fd, 0) == 0) kill(-r->payload, sig); /* not reaped yet: the number is its own */
}

/* A signal for the payload, or NW_PILOT_DIED: done, or passed on to who can do it. ESRCH: it has just ended, which is about to be told. */
static void order(struct nw_run *r, unsigned char what) {
	if (r->role == NW_FRONT) send(r->keeper, &what, 1, MSG_NOSIGNAL);
	else if (what == NW_PILOT_DIED) {
		kill_all(r, "pilot");
		if (getppid() == r->front_pid) kill(r->front_pid, SIGCONT); /* a stopped one nobody would let go to its end any more */
	} else nwp_pidfd_signal(r->payload_fd, what);
}

static void obey(struct nw_run *r) {
	unsigned char what;
	if (recv(r->front, &what, 1, MSG_DONTWAIT) == 1) {
		order(r, what);
		return;
	}
	nwp_close(&r->front);
	kill_all(r, "front"); /* killed: what it can no longer see to is seen to here */
}

void nwp_relay_leave(struct nw_run *r) {
	(void)r;
	for (int i = 0; i < 3; i++) stop_relay(&relays[i]);
}

/* What the pilot sends us is meant for the payload. Job control stops both. */
static void forward(struct nw_run *r, int fd) {
	struct signalfd_siginfo s;
	if (read(fd, &s, sizeof s) != sizeof s) return;
	switch (s.ssi_signo) {
	case SIGCHLD:
	case SIGPIPE:
	case SIGXFSZ:
	case SIGTTIN:
	case SIGTTOU: return;
	case SIGTSTP:
		if (r->role == NW_ALONE) hold(r, SIGSTOP); /* else the keeper sees us stopped */
		raise(SIGSTOP);
		if (r->role == NW_ALONE) hold(r, SIGCONT);
		return;
	default: order(r, (unsigned char)s.ssi_signo);
	}
}

static void take_end(struct nw_run *r) {
	struct nw_msg m;
	if (recv(r->init_sock, &m, sizeof m, MSG_DONTWAIT) == (ssize_t)sizeof m && m.what == NW_NEWS_EXIT) {
		r->status = m.status;
		r->killed = m.killed;
		r->ended = true;
	}
	nwp_close(&r->init_sock); /* read, or init died without a word */
}

static int open_signals(void) {
	sigset_t all;
	sigfillset(&all);
	return signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK);
}

static int timeout(uint64_t wall, uint64_t kill, uint64_t most) {
	uint64_t now = nwp_now_ms(), next = wall < kill ? wall : kill;
	return next == UINT64_MAX ? -1 : next <= now ? 0 : next - now > most ? (int)most : (int)(next - now);
}

/* Nobody is told of another one's SIGSTOP, and nobody can catch one, but that is how batch systems suspend a job: the keeper looks at
 * the front's state in /proc/PID/stat (proc(5); "t" is a debugger's doing), and the payload stops and goes on with the front. */
static void follow(const struct nw_run *r, int stat) {
	char text[256];
	ssize_t n = pread(stat, text, sizeof text - 1, 0);
	text[n > 0 ? n : 0] = 0;
	const char *name_end = strrchr(text, ')');
	bool stopped = name_end && strncmp(name_end, ") T", 3) == 0;
	if (stopped != suspended) hold(r, stopped ? SIGSTOP : SIGCONT);
	suspended = stopped;
}

static void check_time(struct nw_run *r, uint64_t *wall, uint64_t *kill) {
	uint64_t now = nwp_now_ms();
	if (now >= *wall) {
		r->why = "wall";
		order(r, SIGTERM);
		order(r, SIGCONT); /* a stopped payload could not heed it */
		if (suspended) hold(r, SIGCONT);
		*wall = UINT64_MAX;
		*kill = now + r->decision.grace_ms;
	}
	if (now >= *kill) {
		kill_all(r, "wall");
		*kill = UINT64_MAX;
	}
}

/* After the payload's end what its pipes still hold is carried over. Not until they are closed: it may have sent one out of its
 * namespace (SCM_RIGHTS), and whoever has it must not keep us. */
static void drain(void) {
	for (int i = 0, more; i < 3; i++) {
		if (i == 0 || relays[i].from < 0 || ioctl(relays[i].from, FIONREAD, &more)) more = 0;
		while (more > 0 && relays[i].from >= 0) more -= carry_out(&relays[i]);
		stop_relay(&relays[i]);
	}
}

/* Alone: everything. The front: the pilot's side. The keeper: the payload's side, and the front. */
void nwp_supervise(struct nw_run *r) {
	bool front = r->role == NW_FRONT, keeper = r->role == NW_KEEPER;
	uint64_t max = r->guard.max_wall_s * 1000, want = r->decision.wall_ms;
	uint64_t wall = front ? UINT64_MAX : r->start_mono_ms + (want && want < max ? want : max), kill = UINT64_MAX;
	int signals = keeper ? -1 : open_signals(), pilot = r->caller.parent, *control = front ? &r->keeper : &r->init_sock;
	char stat[32];
	snprintf(stat, sizeof stat, "/proc/%d/stat", (int)r->front_pid);
	int look = keeper ? open(stat, O_RDONLY | O_CLOEXEC) : -1;
	while (*control >= 0) {
		struct pollfd p[7] = { { signals, POLLIN, 0 }, { *control, POLLIN, 0 }, { pilot, POLLIN, 0 }, { r->front, POLLIN, 0 } };
		p[4] = held.n && relays[0].to >= 0 ? (struct pollfd){ relays[0].to, POLLOUT, 0 } : (struct pollfd){ relays[0].from, POLLIN, 0 };
		for (int i = 1; i < 3; i++) p[4 + i] = (struct pollfd){ relays[i].from, POLLIN, 0 };
		if (poll(p, 7, timeout(wall, kill, keeper ? LOOK_MS : 3600000)) < 0 && errno != EINTR) order(r, NW_PILOT_DIED);
		if (p[0].revents) forward(r, signals);
		for (int i = 0; i < 3; i++)
			if (p[4 + i].revents && relays[i].from >= 0) i ? (void)carry_out(&relays[i]) : carry_in(&relays[i]);
		if (p[2].revents) {
			order(r, NW_PILOT_DIED);
			pilot = -1;
		}
		if (p[3].revents) obey(r);
		if (p[1].revents) (front ? nwp_front_hear : take_end)(r);
		if (keeper && wall != UINT64_MAX) follow(r, look);
		check_time(r, &wall, &kill);
	}
	nwp_close(&look);
	r->end_mono_ms = nwp_now_ms();
	if (!front) nwp_end_processes(r);
	drain();
	nwp_close(&signals);
}

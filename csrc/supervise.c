/* Step 7: watch the payload, its limits, the pilot, and carry what could not be handed over as it was. */
#include "run.h"

#define LOOK_MS 200
#define FOREGROUND_MS 1000 /* how often a background pilot's terminal is asked whether it is ours by now: nobody tells */

#define RELAYS 4
#define SCREEN 3                /* from the payload's terminal to the pilot's */
#define SCREEN_REST (128 << 10) /* more than a pty holds (drivers/tty/tty_buffer.c) */
#define PIPE (64 << 10)         /* of a pipe as it is made (pipe(7)) */
#define WIDE_PIPE (256 << 10)   /* of one that was seen full; the kernel counts the sizes of all pipes of the pilot's id */

/* Bytes go from -> mid -> to by splice(2), without a copy of ours. Not from -> to: that would hold the lock of the payload's pipe as long as the
 * file system takes, and who waits for that lock cannot be killed (fs/pipe.c, mutex_lock). Where splice(2) is refused (O_APPEND, some devices), and
 * for what mid still holds then: by read and write. Of sockets by recv and send: splice(2) waits for one that does not take more, whatever its own
 * flags say (fs/splice.c, splice_to_socket), and descriptors that come along are dropped. */
struct relay {
	int from, to; /* from -1: done */
	int mid[2];
	size_t in_mid, at, n; /* bytes on their way: in mid; in bytes, from at on */
	size_t size, due;     /* at once; at all */
	size_t piece;         /* of a terminal: to be written at once; else 0 */
	bool plain;
	int family; /* of the pilot's socket, or 0 */
	char *bytes; /* PIPE of them; not in here: what is never touched costs no page */
};

static struct relay relays[RELAYS];
static char room[RELAYS][PIPE];
static bool suspended; /* the payload, with the front */
static bool typed;     /* the stop key, by the pilot: the signal is on its way */
static bool ended;     /* the payload: what there is to relay is no longer its */
static bool impatient; /* somebody wants us to end: a reader who does not read must not keep us */

/* What is handed over can be used for more than it carries. A file, terminal or device is reopened through /proc/self/fd (a log read, a terminal typed
 * into); so is a pipe, by who has its owner's id, the pilot's (mode 0600). Any socket is of the pilot's network, whose interfaces and abstract names
 * it tells and takes (SIOCGIFCONF, bind(2)), carries descriptors out (SCM_RIGHTS) and is a handle of its peer (SO_PEERPIDFD). A pipe as stdin stays:
 * what we took of it too early could not be given back to the pilot, who may go on with it. /dev/null has nothing to give. */
static bool harmless(const struct nw_run *r, int fd, struct stat *st) {
	bool owner = r->decision.mode == NW_LOG_ONLY || !r->launcher->privileged;
	if (fstat(fd, st)) return false;
	return (S_ISFIFO(st->st_mode) && (fd == 0 || !owner)) || (S_ISCHR(st->st_mode) && st->st_rdev == makedev(1, 3));
}

/* Bytes are all that the payload's pipe has: messages would be run together, and an empty one taken for the end. */
static int relay_socket(struct relay *x, int fd) {
	int type;
	socklen_t a = sizeof type, b = sizeof x->family;
	if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &a) || getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &x->family, &b)) return -1;
	x->plain = true;
	errno = EPROTOTYPE;
	return type == SOCK_STREAM ? 0 : -1;
}

static int relay(struct nw_run *r, int fd, bool is_socket) {
	struct relay *x = &relays[fd];
	int p[2], mine = fd == 0 ? 1 : 0;
	if (is_socket && relay_socket(x, fd)) return -1;
	if (pipe2(p, O_CLOEXEC) || pipe2(x->mid, O_CLOEXEC)) return -1;
	/* The payload may open /dev/stdout again, whatever its id: its own pipe is its own. Only who may trace a holder finds it in /proc. */
	if (fchmod(p[0], 0666)) return -1;
	r->std[fd] = p[!mine];
	x->from = fd == 0 ? 0 : p[0];
	x->to = fd == 0 ? p[1] : fd;
	x->size = PIPE;
	x->due = SIZE_MAX;
	return fcntl(p[mine], F_SETFL, O_NONBLOCK);
}

/* A pipe for what is written to the pilot's terminal alone: it must not keep us waiting either. */
static void own_terminal(const struct nw_run *r, int fd) {
	int own = fd ? nwp_reopen(r, fd, O_WRONLY) : -1;
	if (own >= 0) relays[fd].to = own;
}

/* Keys and screen of the payload's own terminal. Where the pilot's could not be opened anew, for writing only as much as surely does not wait. */
static int relay_terminal(struct nw_run *r, const bool *is) {
	struct relay *keys = &relays[0], *screen = &relays[SCREEN];
	int in, out, master = nwp_terminal_open(r, is, &in, &out), again = master < 0 ? -1 : fcntl(master, F_DUPFD_CLOEXEC, 3);
	if (again < 0) return -1;
	screen->from = master;
	screen->to = out >= 0 ? out : is[1];
	screen->piece = out >= 0 ? PIPE : 1;
	if (!is[0]) close(again);
	if (is[0]) keys->from = in >= 0 ? in : 0, keys->to = again, keys->piece = PIPE;
	keys->plain = screen->plain = true;
	keys->size = screen->size = PIPE;
	keys->due = screen->due = SIZE_MAX;
	r->terminal = true;
	return 0;
}

int nwp_relay_open(struct nw_run *r, struct nw_err *e) {
	struct stat st, out;
	bool is[3], plain[3], sock[3];
	for (int i = 0; i < RELAYS; i++) relays[i] = (struct relay){ .from = -1, .to = -1, .mid = { -1, -1 }, .bytes = room[i] };
	for (int fd = 0; fd < 3; fd++) {
		r->std[fd] = fd;
		plain[fd] = harmless(r, fd, &st);
		sock[fd] = !plain[fd] && S_ISSOCK(st.st_mode);
		is[fd] = !plain[fd] && S_ISCHR(st.st_mode) && nwp_is_terminal(fd);
	}
	if ((is[0] || is[1]) && relay_terminal(r, is) && nwp_degrade(r, "terminal", e)) return -1;
	for (int fd = 0; fd < 3; fd++) {
		if (is[fd] && r->terminal) r->std[fd] = r->tty;
		else if (plain[fd] || !(is[fd] || r->profile.namespaces & (sock[fd] ? ~0u : NW_NS_MOUNT))) continue;
		/* stdout and stderr on one file: one pipe, so that the order of lines stays */
		else if (fd == 2 && r->std[1] != 1 && fstat(1, &out) == 0 && fstat(2, &st) == 0 && out.st_dev == st.st_dev && out.st_ino == st.st_ino)
			r->std[2] = r->std[1];
		else if (relay(r, fd, sock[fd])) return -1;
		else if (is[fd]) own_terminal(r, fd);
	}
	return 0;
}

/* The payload's end of its stdin stays with us, to see what it leaves in there; and its terminal, which so never ends by itself. */
void nwp_close_payload_ends(struct nw_run *r) {
	for (int fd = r->role == NW_KEEPER ? 0 : 1; fd < 3; fd++)
		if (r->std[fd] > 2 && r->std[fd] != r->tty && !(fd == 2 && r->std[2] == r->std[1])) close(r->std[fd]);
	if (r->role == NW_KEEPER) nwp_close(&r->tty);
}

static size_t held(const struct relay *x) {
	return x->in_mid + x->n;
}

/* A file as stdin is left where the payload stopped reading it, as if it had had the file itself. */
static void give_back(const struct nw_run *r) {
	struct stat st;
	int unread = 0;
	if (r->std[0] < 3 || fstat(0, &st) || !S_ISREG(st.st_mode) || ioctl(r->std[0], FIONREAD, &unread)) return;
	(void)lseek(0, -(off_t)(held(&relays[0]) + (size_t)unread), SEEK_CUR); /* a file without a position has none to give back */
}

static void stop_relay(struct relay *x) {
	if (x->from > 2) close(x->from);
	if (x->to > 2) close(x->to); /* the payload sees the end of its stdin */
	nwp_close(&x->mid[0]);
	nwp_close(&x->mid[1]);
	x->from = x->to = -1;
	x->in_mid = x->n = 0;
}

/* Not before it is of use. Refused when the pilot's id has too much of it already: then it stays as it is. */
static void widen(struct relay *x) {
	if (x->size == WIDE_PIPE || fcntl(x->mid[0], F_SETPIPE_SZ, WIDE_PIPE) < 0) return;
	fcntl(x == relays ? x->to : x->from, F_SETPIPE_SZ, WIDE_PIPE);
	x->size = WIDE_PIPE;
}

/* Either of these: bytes carried, 0 at the end, -1 with errno. Any error of splice(2) is read's or write's to confirm. */
static ssize_t take(struct relay *x) {
	size_t most = x->due < x->size ? x->due : x->size;
	ssize_t n = x->plain ? -1 : splice(x->from, NULL, x->mid[1], NULL, most, SPLICE_F_NONBLOCK);
	if (n > 0) x->in_mid = (size_t)n;
	else if (n < 0 && (x->plain || (errno != EAGAIN && errno != EINTR))) {
		x->plain = true;
		if (most > PIPE) most = PIPE;
		n = x->family && x == relays ? recv(x->from, x->bytes, most, MSG_DONTWAIT) : read(x->from, x->bytes, most);
		x->at = 0;
		x->n = n > 0 ? (size_t)n : 0;
	}
	if (n > 0 && x->due != SIZE_MAX) x->due -= (size_t)n;
	return n;
}

static ssize_t give(struct relay *x) {
	ssize_t n = x->plain ? -1 : splice(x->mid[0], NULL, x->to, NULL, x->in_mid, SPLICE_F_NONBLOCK);
	if (n > 0) x->in_mid -= (size_t)n;
	if (n >= 0 || (!x->plain && (errno == EAGAIN || errno == EINTR))) return n;
	x->plain = true;
	if (x->n == 0) {
		if ((n = read(x->mid[0], x->bytes, x->in_mid < PIPE ? x->in_mid : PIPE)) <= 0) return n;
		x->in_mid -= (size_t)n;
		x->at = 0;
		x->n = (size_t)n;
	}
	size_t most = x->piece && x->n > x->piece ? x->piece : x->n;
	n = x->family && x != relays ? send(x->to, x->bytes + x->at, most, MSG_DONTWAIT | MSG_NOSIGNAL) : write(x->to, x->bytes + x->at, most);
	if (n > 0) x->at += (size_t)n, x->n -= (size_t)n;
	return n;
}

/* What the payload could not be told, since it had not the file itself, its pilot is told. */
static void fault(struct nw_run *r, const struct relay *x) {
	static const char *const name[] = { "stdin could not be read", "stdout could not be written", "stderr could not be written" };
	/* Of a local socket: its peer closed with output unread, after all of its own input; it had none (af_unix.c). */
	if (x->family == AF_UNIX && (errno == ECONNRESET || errno == EINVAL || errno == ENOTCONN)) return;
	if (x->piece || errno == EPIPE || errno == EISDIR || (x == relays && errno == EBADF)) return; /* a terminal that has gone is no fault */
	nw_fail(&r->stdio, NW_INTERNAL, "NW-STDIO", "the payload's %s to its end: %s", name[x - relays], strerror(errno));
}

/* One step: what is held goes on as fast as it is taken, and only then more comes. The end of one side is the end of the other: a payload gets its
 * SIGPIPE, as it would have. */
static void carry(struct nw_run *r, struct relay *x) {
	ssize_t n = held(x) ? 1 : take(x);
	if (n > 0 && !x->piece && held(x) >= PIPE) widen(x);
	if (n > 0 && x == relays && x->piece && nwp_terminal_stop_key(r->tty, x->to, x->bytes + x->at, &x->n))
		kill(0, SIGTSTP), typed = true; /* the job, as a terminal does; the keeper and all of its are in another session */
	if (n > 0 && held(x)) n = give(x);
	if (n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR))) return;
	if (n < 0) fault(r, x);
	if (x->piece) stop_relay(&relays[x == relays ? SCREEN : 0]); /* the pilot's terminal has gone: with the last master the payload's hangs up */
	stop_relay(x);
}

int nwp_cgroup(const struct nw_run *r, const char *file, const char *text) {
	int fd = r->cgroup_fd < 0 ? -1 : openat(r->cgroup_fd, file, O_WRONLY | O_CLOEXEC);
	bool bad = fd < 0 || write(fd, text, strlen(text)) < 0;
	nwp_close(&fd);
	return -bad;
}

static void kill_all(struct nw_run *r, const char *why) {
	if (!r->why) r->why = why;
	nwp_cgroup(r, "cgroup.kill", "1");                 /* at once: among 2,000 processes that fork, init's own death waits for its turn */
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
	for (int i = 0; i < RELAYS; i++) stop_relay(&relays[i]);
}

/* After a key the kernel has the word: where nobody would let us go on (an orphaned process group: the launcher is a terminal's first process, say)
 * it stops nobody. Who sends the signal himself means it. */
static void stop(bool key) {
	sigset_t one;
	sigemptyset(&one);
	sigaddset(&one, SIGTSTP);
	kill(getpid(), key ? SIGTSTP : SIGSTOP);
	sigprocmask(SIG_UNBLOCK, &one, NULL);
	sigprocmask(SIG_BLOCK, &one, NULL);
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
		nwp_terminal_rest();
		if (r->role == NW_ALONE) hold(r, SIGSTOP); /* else the keeper sees us stopped */
		stop(typed || s.ssi_code == SI_KERNEL);
		typed = false;
		if (r->role == NW_ALONE) hold(r, SIGCONT);
		return;
	case SIGWINCH:
		if (!r->terminal) break;
		nwp_terminal_size(relays[SCREEN].to, relays[SCREEN].from);
		return;
	case SIGCONT: nwp_terminal_again(); break;
	case SIGURG: break;
	case SIGINT:
	case SIGQUIT: /* typed, where the keyboard is not ours: for those that a terminal means */
		if (s.ssi_code == SI_KERNEL && r->terminal && ioctl(relays[SCREEN].from, TIOCSIG, (int)s.ssi_signo) == 0) return;
		impatient = true;
		break;
	default: impatient = true;
	}
	order(r, (unsigned char)s.ssi_signo);
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
	const sigset_t all = nwp_all_signals();
	return signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK);
}

static int timeout(uint64_t wall, uint64_t kill, uint64_t most) {
	uint64_t now = nwp_now_ms(), next = wall < kill ? wall : kill;
	return next <= now ? 0 : next - now > most ? (int)most : (int)(next - now);
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

static void check_time(struct nw_run *r, uint64_t *wall, uint64_t *kill, const char *why) {
	uint64_t now = nwp_now_ms();
	if (now >= *wall) {
		r->why = why;
		order(r, SIGTERM);
		order(r, SIGCONT); /* a stopped payload could not heed it */
		if (suspended) hold(r, SIGCONT);
		*wall = UINT64_MAX;
		*kill = now + r->decision.grace_ms;
	}
	if (now >= *kill) {
		kill_all(r, why);
		*kill = UINT64_MAX;
	}
}

/* Who we watch, and until when. */
struct watch {
	int signals, *control, pilot, look;
	uint64_t wall, kill; /* ms; UINT64_MAX: never */
	const char *why;     /* when the wall is reached */
	struct nw_scratch scratch;
};

static bool relaying(void) {
	return relays[1].from >= 0 || relays[2].from >= 0 || relays[SCREEN].from >= 0;
}

static void poll_relay(const struct relay *x, struct pollfd *p) {
	bool on = held(x) > 0;
	p[0] = p[1] = (struct pollfd){ -1, 0, 0 };
	if (x == relays && nwp_terminal_wanted() && !nwp_terminal_take(x->to)) return; /* who reads it in the background gets EIO for it */
	p[0] = (struct pollfd){ on ? x->to : x->from, on ? POLLOUT : POLLIN, 0 };
	p[1] = (struct pollfd){ on ? -1 : x->to, 0, 0 }; /* its reader has gone: no more is taken from the pilot for it */
}

static void move(struct nw_run *r, struct relay *x, const struct pollfd *p) {
	if (x->from < 0) return;
	if (p[1].revents) stop_relay(x);
	else if (p[0].revents) carry(r, x);
	if (ended && held(x) == 0 && (x->due == 0 || !p[0].revents)) stop_relay(x);
}

/* After the payload's end what its pipes still hold is carried over. Not until they are closed: it may have sent one out of its
 * namespace (SCM_RIGHTS), and whoever has it must not keep us. Nor must a reader without a pilot who misses him. */
static void see_end(const struct nw_run *r) {
	ended = true;
	if (r->role != NW_KEEPER) give_back(r);
	stop_relay(&relays[0]);
	for (int i = 1, more; i < 3; i++) relays[i].due = relays[i].from >= 0 && ioctl(relays[i].from, FIONREAD, &more) == 0 ? (size_t)more : 0;
	relays[SCREEN].due = SCREEN_REST; /* poll(2) sees to it that what is on its way has come (n_tty.c, tty_buffer_flush_work) */
}

static void turn(struct nw_run *r, struct watch *w) {
	struct pollfd p[4 + 2 * RELAYS] = { { w->signals, POLLIN, 0 }, { *w->control, POLLIN, 0 }, { w->pilot, POLLIN, 0 }, { r->front, POLLIN, 0 } };
	for (size_t i = 0; i < RELAYS; i++) poll_relay(&relays[i], p + 4 + 2 * i);
	bool holding = held(&relays[1]) + held(&relays[2]) + held(&relays[SCREEN]) > 0;
	uint64_t soon = w->scratch.next < w->wall ? w->scratch.next : w->wall;
	uint64_t most = r->role == NW_KEEPER ? LOOK_MS : nwp_terminal_wanted() ? FOREGROUND_MS : 3600000;
	int ms = ended ? (!holding ? 0 : impatient ? 1000 : -1) : timeout(soon, w->kill, most);
	int n = poll(p, 4 + 2 * RELAYS, ms);
	bool broken = n < 0 && errno != EINTR;
	if (broken) order(r, NW_PILOT_DIED);
	if (p[0].revents) forward(r, w->signals);
	for (size_t i = 0; i < RELAYS; i++) move(r, &relays[i], p + 4 + 2 * i);
	if (p[2].revents) {
		order(r, NW_PILOT_DIED);
		w->pilot = -1;
		impatient = true;
	}
	if (ended && (n == 0 || broken)) nwp_relay_leave(r);
	if (ended) return;
	if (p[3].revents) obey(r);
	if (p[1].revents) (r->role == NW_FRONT ? nwp_front_hear : take_end)(r);
	if (r->role == NW_KEEPER && w->wall != UINT64_MAX) follow(r, w->look);
	if (r->role != NW_FRONT && w->wall != UINT64_MAX && nwp_look_at_scratch(r, &w->scratch)) w->wall = 0, w->why = "scratch";
	check_time(r, &w->wall, &w->kill, w->why);
}

/* Alone: everything. The front: the pilot's side. The keeper: the payload's side, and the front. */
void nwp_supervise(struct nw_run *r) {
	bool front = r->role == NW_FRONT, keeper = r->role == NW_KEEPER;
	uint64_t max = r->guard.max_wall_s * 1000, want = r->decision.wall_ms;
	struct watch w = { -1, front ? &r->keeper : &r->init_sock, r->caller.parent, -1, UINT64_MAX, UINT64_MAX, "wall", { 0, UINT64_MAX, 0, 0 } };
	char stat[32];
	if (!front) w.wall = r->start_mono_ms + (want && want < max ? want : max);
	if (!front) nwp_scratch_begin(r, &w.scratch);
	if (!keeper) w.signals = open_signals();
	snprintf(stat, sizeof stat, "/proc/%d/stat", (int)r->front_pid);
	if (keeper) w.look = open(stat, O_RDONLY | O_CLOEXEC);
	while (*w.control >= 0) turn(r, &w);
	nwp_close(&w.look);
	nwp_scratch_end(&w.scratch);
	r->end_mono_ms = nwp_now_ms();
	nwp_terminal_unguard();
	if (!front) nwp_end_processes(r);
	see_end(r);
	while (relaying()) turn(r, &w);
	nwp_terminal_end();
	nwp_close(&w.signals);
}

/* When the pilot's stdin or stdout is a terminal, the payload gets one of its own (a pty), which it can do nothing to the pilot's with: no typing
 * into it (TIOCSTI), no changing its modes, no reading what is meant for others. The keys go through as they are; ^C and the like are the
 * business of the payload's own terminal. */
#include "run.h"

#include <termios.h>

static int keyboard = -1; /* the pilot's terminal, when it is stdin */
static bool raw;
static struct termios saved, ours;
static pid_t guard; /* 0: not yet; -1: none, or no more */
static int guard_pipe = -1;

bool nwp_is_terminal(int fd) {
	struct termios t;
	return tcgetattr(fd, &t) == 0;
}

/* The same terminal, opened anew as the pilot, for an O_NONBLOCK of our own; where the pilot may not (after su(1)), -1. */
int nwp_reopen(const struct nw_run *r, int fd, int flags) {
	char path[32];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	int own = nwp_as_caller(r, true) ? -1 : open(path, flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
	nwp_as_caller(r, false);
	return own;
}

/* By a descriptor, not by a name in some /dev/pts (TIOCGPTPEER, Linux 4.13). */
static int open_pty(struct nw_run *r) {
	int unlock = 0, master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
	if (master < 0 || ioctl(master, TIOCSPTLCK, &unlock) || (r->tty = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0)
		nwp_close(&master);
	return master;
}

/* The master, and the pilot's terminal as in and out: -1 where it is none, or where it could not be opened anew. -1: no pty. */
int nwp_terminal_open(struct nw_run *r, const bool *is, int *in, int *out) {
	struct termios like;
	int shown = is[1] ? 1 : 0, master = open_pty(r);
	if (master < 0) return -1;
	*in = is[0] ? nwp_reopen(r, 0, O_RDONLY) : -1;
	*out = nwp_reopen(r, shown, O_WRONLY);
	if (is[0]) keyboard = fcntl(*in >= 0 ? *in : 0, F_DUPFD_CLOEXEC, 3);
	if (tcgetattr(shown, &like) == 0) {
		if (!is[0]) like.c_oflag &= ~(tcflag_t)OPOST; /* the pilot's terminal, which is left as it is, does that */
		tcsetattr(r->tty, TCSANOW, &like);
	}
	nwp_terminal_size(shown, master);
	return master;
}

/* The kernel tells the payload (SIGWINCH). */
void nwp_terminal_size(int from, int to) {
	struct winsize size;
	if (ioctl(from, TIOCGWINSZ, &size) == 0) ioctl(to, TIOCSWINSZ, &size);
}

/* Whose terminal it is at the moment. All signals are blocked here, so that the kernel would not stop us as it stops others in the background. */
static bool foreground(void) {
	pid_t group;
	return ioctl(keyboard, TIOCGPGRP, &group) || group == getpgrp(); /* ENOTTY: not our controlling terminal, nobody's job control */
}

/* Somebody must give the pilot its terminal back when we are killed: who waits for the end of a pipe that only we hold. */
static void post_guard(void) {
	struct termios now;
	char told;
	int p[2];
	if (pipe2(p, O_CLOEXEC)) return;
	guard = fork();
	if (guard == 0) {
		if (setsid() < 0 || dup2(keyboard, 0) || dup2(p[0], 1) != 1 || close_range(2, ~0u, 0)) _exit(1);
		bool dead = read(1, &told, 1) == 0;
		if (dead && tcgetattr(0, &now) == 0 && now.c_lflag == ours.c_lflag && now.c_iflag == ours.c_iflag) tcsetattr(0, TCSANOW, &saved);
		_exit(0);
	}
	close(p[0]);
	guard_pipe = p[1];
}

/* Before children are counted, and ended: it would be one of them. */
void nwp_terminal_unguard(void) {
	if (guard <= 0) return;
	if (write(guard_pipe, "", 1) != 1) kill(guard, SIGKILL);
	nwp_close(&guard_pipe);
	nwp_wait(guard, 1000);
	guard = -1;
}

/* The pilot's keyboard is ours to read. False: we are in the background, and leave it alone. */
bool nwp_terminal_take(int master) {
	if (raw) return true;
	if (!foreground() || tcgetattr(keyboard, &saved)) return false;
	ours = saved;
	cfmakeraw(&ours);
	if (guard == 0) post_guard();
	raw = tcsetattr(keyboard, TCSANOW, &ours) == 0;
	nwp_terminal_size(keyboard, master); /* it may have changed meanwhile */
	return raw;
}

bool nwp_terminal_wanted(void) {
	return keyboard >= 0 && !raw;
}

/* Given back, as long as it is ours to do. */
void nwp_terminal_rest(void) {
	if (raw && foreground()) tcsetattr(keyboard, TCSANOW, &saved);
	raw = false;
}

void nwp_terminal_end(void) {
	nwp_terminal_rest();
	nwp_terminal_unguard();
	nwp_close(&keyboard);
}

/* We have been continued: a shell may have used it meanwhile. */
void nwp_terminal_again(void) {
	raw = false;
}

/* The key that stops jobs, typed when nothing stands between the payload and us that heeds it: the kernel does not stop a process group whose
 * parents are all elsewhere (setpgid(2), orphaned). A shell's job inside is stopped by the payload's own terminal. The key is taken out. It must be
 * the pilot's own, too: a payload that makes another one of it would stop the pilot's job. */
bool nwp_terminal_stop_key(int tty, int master, char *bytes, size_t *n) {
	struct termios t;
	pid_t group, session;
	if (tcgetattr(tty, &t) || !(t.c_lflag & saved.c_lflag & ISIG) || t.c_cc[VSUSP] == 0 || t.c_cc[VSUSP] != saved.c_cc[VSUSP]) return false;
	char *key = memchr(bytes, t.c_cc[VSUSP], *n);
	if (!key || ioctl(master, TIOCGPGRP, &group) || ioctl(master, TIOCGSID, &session) || group != session) return false;
	memmove(key, key + 1, *n - (size_t)(key + 1 - bytes));
	--*n;
	return true;
}

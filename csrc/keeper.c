/* The front process stays what the pilot knows: its real uid, its child, its descriptors, its signals. Under a privileged launcher all
 * the rest is done by the keeper, a child that is root through and through: the pilot cannot signal it, it holds none of the pilot's
 * descriptors but --status-fd, and when the front is killed it ends, cleans and records the run, and then goes (I9, I15). */
#include "run.h"

struct word {
	int code; /* the front's exit status */
	struct nw_err err;
};

/* The keeper's side: nothing by which the pilot could reach or miss it. Its own session: signals to the job's group are not for it. */
static int become_keeper(struct nw_run *r, int sock, struct nw_err *e) {
	r->role = NW_KEEPER;
	r->front = sock;
	nwp_relay_leave(r);
	nwp_terminal_end();
	if (setsid() < 0 || setresgid(0, 0, 0) || setresuid(0, 0, 0) || prctl(PR_SET_NAME, "nodewrap-keeper") || prctl(PR_SET_DUMPABLE, 0))
		return nw_fail(e, NW_INTERNAL, "NW-KEEPER", "the keeper cannot become root: %s", strerror(errno));
	return 0;
}

/* From here on two processes; r->role tells which. Before the lease: its locks are never in a process that the pilot may stop. */
int nwp_split(struct nw_run *r, struct nw_err *e) {
	char name[16];
	int pair[2];
	r->front_pid = getpid();
	snprintf(name, sizeof name, "nw-%s", r->run + 24); /* by which "nodewrap ps" knows the caller's own runs */
	if (prctl(PR_SET_NAME, name)) return nw_fail(e, NW_INTERNAL, "NW-KERNEL", "prctl: %s", strerror(errno));
	if (!r->launcher->privileged) return 0;
	/* A stream: of a closed packet socket the front would lose what it has not read yet when it sends once more (net/unix/af_unix.c). */
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) || (r->keeper_pid = fork()) < 0)
		return nw_fail(e, NW_INTERNAL, "NW-KEEPER", "no keeper: %s", strerror(errno));
	close(pair[r->keeper_pid ? 1 : 0]);
	if (r->keeper_pid == 0) return become_keeper(r, pair[1], e);
	r->role = NW_FRONT;
	r->keeper = pair[0];
	return 0;
}

/* Without its stdio the keeper cannot keep a pilot waiting for the end of a pipe. */
int nwp_let_go(void) {
	int null = open("/dev/null", O_RDWR | O_CLOEXEC), bad = null < 0;
	for (int fd = 0; fd < 3 && !bad; fd++) bad = dup2(null, fd) != fd;
	nwp_close(&null);
	return bad;
}

void nwp_keeper_tell(struct nw_run *r, int code, const struct nw_err *e) {
	struct word w = { code, *e };
	send(r->front, &w, sizeof w, MSG_NOSIGNAL); /* the front may be gone: then nobody asks */
}

void nwp_front_hear(struct nw_run *r) {
	struct word w;
	r->heard = recv(r->keeper, &w, sizeof w, MSG_DONTWAIT) == (ssize_t)sizeof w;
	if (r->heard) r->code = w.code, r->word = w.err;
	nwp_close(&r->keeper);
}

/* The keeper is waited for, so that what the payload used is the pilot's children's (getrusage(2)). */
int nwp_front_end(struct nw_run *r, struct nw_err *e) {
	nwp_wait(r->keeper_pid, -1);
	if (!r->heard) nwp_sweep_before(r, e); /* the next run would do it: why wait */
	if (!r->heard)
		return nw_fail(e, NW_INTERNAL, "NW-KEEPER", "the keeper was killed from outside, and the payload with it; %s run %s",
			r->unswept ? "see \"nodewrap sweep\" for" : "a sweep has finished", r->run);
	*e = r->word;
	return 0;
}

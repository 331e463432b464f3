/* Private networks (docs/network.md): "nodewrap netd" keeps namespaces that are ready; here one is asked for, and its address checked. What is
 * in it, a link and its rules, belongs to the namespace and ends with it: there is nothing to undo. Without privilege a child of ours makes
 * one of init's own namespace. */
#include "run.h"

#include <arpa/inet.h>

struct given {
	uint32_t error, address; /* 0; in network byte order */
	char text[248];          /* of an error; else the address of IPv6 that the namespace has, too */
};

/* Never the host's network instead: without, there is loopback alone, and that only where the profile says "degrade". */
static int cannot(struct nw_run *r, struct nw_err *e, const char *why) {
	if (r->profile.degrade) return nwp_degrade(r, "private-network", e);
	return nw_fail(e, NW_INTERNAL, "NW-NET", "no private network for profile %s: %s; see \"nodewrap doctor\"", r->profile.name, why);
}

/* Nobody waits longer than this: netd may be stopped, and its queue of connections full (unix(7): connect obeys SO_SNDTIMEO). */
static int patient(const struct nw_run *r, int s) {
	struct timeval t = { (time_t)(r->guard.deadline_ms / 1000), (suseconds_t)(r->guard.deadline_ms % 1000 * 1000) };
	return setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t) || setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t) ? -1 : 0;
}

static int reach(struct nw_run *r) {
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	struct ucred peer;
	socklen_t size = sizeof peer;
	int s = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	bool bad = s < 0 || snprintf(a.sun_path, sizeof a.sun_path, "%s", r->guard.netd) >= (int)sizeof a.sun_path ||
		   patient(r, s) || connect(s, (struct sockaddr *)&a, sizeof a) || getsockopt(s, SOL_SOCKET, SO_PEERCRED, &peer, &size);
	if (!bad && peer.uid != 0) bad = true, errno = EPERM;
	if (bad) nwp_close(&s);
	return s;
}

/* nodewrap/netrun.py: with nothing of the pilot's, and not in its session. Ends with us. */
static void __attribute__((noreturn)) become_maker(struct nw_run *r, pid_t us, int sock, int netns) {
	char *argv[] = { (char *)(uintptr_t)r->guard.python, (char *)"-I", (char *)"-S", (char *)"-B", (char *)(uintptr_t)r->guard.script, (char *)"net",
		(char *)(uintptr_t)r->guard_path, NULL };
	char *env[] = { (char *)"PATH=/usr/bin:/bin", (char *)"LC_ALL=C.UTF-8", NULL };
	int null = open("/dev/null", O_RDWR | O_CLOEXEC), fd[] = { null, null, null, sock, r->userns, netns };
	struct sigaction dfl = { .sa_handler = SIG_DFL };
	sigset_t none;
	sigemptyset(&none);
	for (int i = 0; i < 6; i++) fd[i] = fcntl(fd[i], F_DUPFD_CLOEXEC, 10);
	for (int i = 0; i < 6; i++)
		if (fd[i] < 0 || dup2(fd[i], i) != i) _exit(1);
	if (close_range(6, ~0u, 0) || setsid() < 0) _exit(1);
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != us) _exit(1);
	if (sigaction(SIGPIPE, &dfl, NULL) || sigaction(SIGXFSZ, &dfl, NULL) || sigprocmask(SIG_SETMASK, &none, NULL)) _exit(1);
	execve(argv[0], argv, env);
	_exit(1);
}

static int trusted(const struct nw_run *r, struct nw_err *e) {
	const char *const must[] = { r->guard.python, r->guard.script };
	for (int i = 0; i < 2; i++) {
		int fd = nwp_open_trusted(must[i], nwp_trusted_owner(r), O_PATH, e);
		if (fd < 0) return -1;
		close(fd);
	}
	return 0;
}

static int spawn(struct nw_run *r, pid_t *maker) {
	char path[64];
	pid_t us = getpid();
	int pair[2] = { -1, -1 }, netns;
	snprintf(path, sizeof path, "/proc/%d/ns/net", (int)r->init);
	netns = open(path, O_RDONLY | O_CLOEXEC);
	if (netns >= 0 && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0 && patient(r, pair[0]) == 0) *maker = fork();
	if (*maker == 0 && pair[0] >= 0) become_maker(r, us, pair[1], netns);
	nwp_close(&netns);
	nwp_close(&pair[1]);
	if (*maker < 0) nwp_close(&pair[0]);
	return pair[0];
}

static int receive(int s, const char *who, struct given *g) {
	pid_t pid;
	int fd = -1;
	ssize_t n = nwp_receive_fd(s, g, sizeof *g, 0, &pid, &fd);
	g->text[sizeof g->text - 1] = 0;
	if (n == (ssize_t)sizeof *g) return fd;
	g->error = 1;
	snprintf(g->text, sizeof g->text, "%s %s", who, n < 0 && errno == EAGAIN ? "does not answer" : "hung up");
	nwp_close(&fd);
	return -1;
}

/* Where it connected to, in netd's words, for the record. A netd that died or hangs is no reason to wait: then nothing is known. */
void nwp_network_end(struct nw_run *r) {
	struct pollfd p = { r->netd, POLLIN, 0 };
	ssize_t n = -1;
	if (r->netd < 0) return;
	if (send(r->netd, "", 1, MSG_NOSIGNAL) == 1 && poll(&p, 1, 1000) == 1) n = recv(r->netd, r->remote, sizeof r->remote, MSG_DONTWAIT);
	for (r->remotes = 0; (r->remotes + 1) * (ssize_t)sizeof *r->remote <= n; r->remotes++) r->remote[r->remotes][sizeof *r->remote - 1] = 0;
	nwp_close(&r->netd);
}

/* What the guard makes of an address of IPv4 (docs/network.md); "" for nothing. */
static void expected6(const struct nw_run *r, char *to, size_t size) {
	unsigned char a[16];
	uint32_t four = htonl(r->address);
	memcpy(a, r->guard.network6, sizeof a);
	memcpy(a + 12, &four, sizeof four);
	if (!r->launcher->privileged || !r->guard.bits6 || !inet_ntop(AF_INET6, a, to, (socklen_t)size)) *to = 0;
}

/* Before init, which enters it; without privilege after init, whose it is. The connection stays: its end, whatever ends us, is the end of the run
 * for the other side. */
int nwp_network(struct nw_run *r, struct nw_err *e) {
	bool own = !r->launcher->privileged;
	const char *who = own ? "netrun" : "netd";
	struct given g = { 0 };
	pid_t maker = -1;
	void *rules;
	size_t len;
	if (!r->profile.network[0] || own != (r->init > 0)) return 0;
	if (!r->guard.netmask || !(own || r->guard.netd[0]))
		return cannot(r, e, own ? "the guard has no line \"network\"" : "the guard has no lines \"network\" and \"netd\"");
	if (own && !(r->profile.namespaces & NW_NS_PID)) return cannot(r, e, "without a namespace of processes the payload could end what makes it");
	if ((own && trusted(r, e)) || nwp_policy_file(r, r->profile.network, &rules, &len, e)) return -1;
	struct iovec part[] = { { &r->caller.uid, sizeof r->caller.uid }, { rules, len } };
	struct msghdr m = { .msg_iov = part, .msg_iovlen = 2 };
	r->netd = own ? spawn(r, &maker) : reach(r);
	g.error = r->netd < 0 || sendmsg(r->netd, &m, MSG_NOSIGNAL) != (ssize_t)(sizeof r->caller.uid + len);
	if (g.error)
		snprintf(g.text, sizeof g.text, "%.150s: %s%s", own ? who : r->guard.netd, strerror(errno), own ? "" : "; start \"nodewrap netd\"");
	else r->netns = receive(r->netd, who, &g);
	free(rules);
	r->address = ntohl(g.address);
	expected6(r, r->address6, sizeof r->address6);
	bool wrong = own != (r->netns < 0) || (r->address & r->guard.netmask) != r->guard.network || strcmp(g.text, r->address6);
	if (!g.error && !wrong) return 0;
	if (!g.error || !g.text[0])
		snprintf(g.text, sizeof g.text, "%s gave an address outside of the guard's networks, or none; restart it after a change of the guard", who);
	r->address = 0;
	r->address6[0] = 0;
	nwp_close(&r->netns);
	nwp_close(&r->netd);
	if (maker > 0) nwp_wait(maker, 0); /* and what it started dies with it */
	return cannot(r, e, g.text);
}

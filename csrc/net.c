/* Private networks (docs/network.md): "nodewrap netd" keeps namespaces that are ready; here one is asked for, and its address checked. What is
 * in it, a link and its rules, belongs to the namespace and ends with it: there is nothing to undo. */
#include "run.h"

#include <arpa/inet.h>

struct given {
	uint32_t error, address; /* 0; in network byte order */
	char text[248];          /* of an error */
};

/* Never the host's network instead: without, there is loopback alone, and that only where the profile says "degrade". */
static int cannot(struct nw_run *r, struct nw_err *e, const char *why) {
	if (r->profile.degrade) return nwp_degrade(r, "private-network", e);
	return nw_fail(e, NW_INTERNAL, "NW-NET", "no private network for profile %s: %s; see \"nodewrap doctor\"", r->profile.name, why);
}

/* Nobody waits longer than this: netd may be stopped, and its queue of connections full (unix(7): connect obeys SO_SNDTIMEO). */
static int reach(struct nw_run *r) {
	struct timeval patience = { (time_t)(r->guard.deadline_ms / 1000), (suseconds_t)(r->guard.deadline_ms % 1000 * 1000) };
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	struct ucred peer;
	socklen_t size = sizeof peer;
	int s = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	bool bad = s < 0 || snprintf(a.sun_path, sizeof a.sun_path, "%s", r->guard.netd) >= (int)sizeof a.sun_path ||
		   setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) || setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) ||
		   connect(s, (struct sockaddr *)&a, sizeof a) || getsockopt(s, SOL_SOCKET, SO_PEERCRED, &peer, &size);
	if (!bad && peer.uid != 0) bad = true, errno = EPERM;
	if (bad) nwp_close(&s);
	return s;
}

static int receive(int s, struct given *g) {
	union {
		char b[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = { { 0 } };
	struct iovec v = { g, sizeof *g };
	struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1, .msg_control = control.b, .msg_controllen = sizeof control.b };
	ssize_t n = recvmsg(s, &m, MSG_CMSG_CLOEXEC);
	struct cmsghdr *c = n < 0 ? NULL : CMSG_FIRSTHDR(&m);
	int fd = -1;
	if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) memcpy(&fd, CMSG_DATA(c), sizeof fd);
	g->text[sizeof g->text - 1] = 0;
	if (n == (ssize_t)sizeof *g) return fd;
	snprintf(g->text, sizeof g->text, "netd %s", n < 0 && errno == EAGAIN ? "does not answer" : "hung up");
	nwp_close(&fd);
	return -1;
}

/* Where it connected to, in netd's words, for the record. A netd that died or hangs is no reason to wait: then nothing is known. */
void nwp_network_end(struct nw_run *r) {
	struct pollfd p = { r->netd, POLLIN, 0 };
	ssize_t n = -1;
	if (r->netd >= 0 && send(r->netd, "", 1, MSG_NOSIGNAL) == 1 && poll(&p, 1, 1000) == 1) n = recv(r->netd, r->remote, sizeof r->remote, MSG_DONTWAIT);
	for (r->remotes = 0; (r->remotes + 1) * (ssize_t)sizeof *r->remote <= n; r->remotes++) r->remote[r->remotes][sizeof *r->remote - 1] = 0;
	nwp_close(&r->netd);
}

/* Before init, which enters it. The connection stays: its end, whatever ends us, is the end of the run for netd. */
int nwp_network(struct nw_run *r, struct nw_err *e) {
	struct given g = { 0 };
	void *rules;
	size_t len;
	if (!r->profile.network[0]) return 0;
	if (!r->launcher->privileged) return cannot(r, e, "it takes a privileged launcher");
	if (!r->guard.netmask || !r->guard.netd[0]) return cannot(r, e, "the guard has no lines \"network\" and \"netd\"");
	if (nwp_policy_file(r, r->profile.network, &rules, &len, e)) return -1;
	struct iovec part[] = { { &r->caller.uid, sizeof r->caller.uid }, { rules, len } };
	struct msghdr m = { .msg_iov = part, .msg_iovlen = 2 };
	if ((r->netd = reach(r)) < 0 || sendmsg(r->netd, &m, MSG_NOSIGNAL) != (ssize_t)(sizeof r->caller.uid + len))
		snprintf(g.text, sizeof g.text, "%.150s: %s; start \"nodewrap netd\"", r->guard.netd, strerror(errno));
	else r->netns = receive(r->netd, &g);
	free(rules);
	r->address = ntohl(g.address);
	if (!g.text[0] && (g.error || r->netns < 0 || (r->address & r->guard.netmask) != r->guard.network))
		snprintf(g.text, sizeof g.text, "netd gave an address outside of the guard's network, or none");
	if (!g.text[0]) return 0;
	r->address = 0;
	nwp_close(&r->netns);
	nwp_close(&r->netd);
	return cannot(r, e, g.text);
}

/* Step 3: ask the policy child, spawned for this request or resident (policyd). One HELLO and REQUEST out, OPEN and OPENED in
 * between, one DECISION back, all before a deadline. Its death, silence or nonsense is NW-CHILD (202), never a permit. */
#include "run.h"

#define OPENS 64
#define CREDENTIAL_MAX (1 << 20)

struct talk {
	struct nw_run *run;
	int sock;
	uint64_t deadline;
	pid_t pid; /* 0: policyd */
};

static int lost(struct nw_err *e, const char *what) {
	return nw_fail(e, NW_INTERNAL, "NW-CHILD", "the policy child %s; see syslog, \"nodewrap doctor\"", what);
}

static int await(struct talk *t, short events, struct nw_err *e) {
	struct pollfd p = { t->sock, events, 0 };
	for (;;) {
		uint64_t now = nwp_now_ms();
		if (now >= t->deadline) return lost(e, "did not answer before the deadline (deadline-ms in the guard)");
		int n = poll(&p, 1, (int)(t->deadline - now));
		if (n > 0) return 0;
		if (n < 0 && errno != EINTR) return lost(e, strerror(errno));
	}
}

static int send_all(struct talk *t, const unsigned char *p, size_t n, int fd, struct nw_err *e) {
	while (n > 0) {
		if (await(t, POLLOUT, e)) return -1;
		ssize_t w = nwp_send_fd(t->sock, p, n, fd, MSG_DONTWAIT);
		if (w < 0 && (errno == EAGAIN || errno == EINTR)) continue;
		if (w <= 0) return lost(e, "hung up");
		p += w;
		n -= (size_t)w;
		fd = -1;
	}
	return 0;
}

static int receive(struct talk *t, unsigned char *p, size_t n, struct nw_err *e) {
	while (n > 0) {
		ssize_t got;
		if (await(t, POLLIN, e)) return -1;
		got = recv(t->sock, p, n, MSG_DONTWAIT);
		if (got < 0 && (errno == EAGAIN || errno == EINTR)) continue;
		if (got <= 0) return lost(e, "died before it decided");
		p += got;
		n -= (size_t)got;
	}
	return 0;
}

static int send_frame(struct talk *t, struct nw_buf *b, enum nw_frame type, int fd, struct nw_err *e) {
	int bad = nw_frame_end(b, type) ? lost(e, "needs more memory than there is") : send_all(t, b->data, b->len, fd, e);
	nw_buf_free(b);
	return bad;
}

/* A file that the caller named, with the caller's own rights, once (I4). Not a link, not in /proc (there "self" would be us). */
static int open_for_caller(struct nw_run *r, const char *path, int flags) {
	struct statfs fs;
	int fd = -1, err;
	if (path[0] == '/' && nwp_as_caller(r, true) == 0)
		fd = nwp_openat2(AT_FDCWD, path, O_RDONLY | O_NONBLOCK | O_NOCTTY | flags, 0, RESOLVE_NO_MAGICLINKS);
	else errno = EACCES;
	err = errno;
	nwp_as_caller(r, false);
	if (fd >= 0 && (fstatfs(fd, &fs) || fs.f_type == PROC_SUPER_MAGIC)) {
		nwp_close(&fd);
		err = EACCES;
	}
	errno = err;
	return fd;
}

/* An image stays open: what was looked at is what the payload gets. Links are followed, with the caller's rights (on CVMFS most images are
 * links), and where they led to is for the policy to judge. */
static int keep_image(struct nw_run *r, int fd) {
	char link[32], path[4096];
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	ssize_t n = readlink(link, path, sizeof path - 1);
	if (n < 0) return -1;
	path[n] = 0;
	nwp_close(&r->image.fd);
	r->image.fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	return (r->image.path = strdup(path)) && r->image.fd >= 0 ? nwp_look_at(&r->image) : -1;
}

/* A public trust anchor by its name below a directory that the guard names; links may not lead out of it. */
static int open_anchor(struct nw_run *r, const char *dir, const char *name) {
	struct nw_err e = { 0 };
	int at = dir[0] ? nwp_open_trusted(dir, nwp_trusted_owner(r), O_PATH | O_DIRECTORY, &e) : -1, fd;
	if (at < 0) {
		errno = dir[0] ? ENOTDIR : ENOENT; /* a directory that is named and cannot be had is the site's fault, not the credential's */
		return -1;
	}
	fd = nwp_openat2(at, name, O_RDONLY | O_NONBLOCK | O_NOCTTY, 0, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS);
	int err = errno;
	close(at);
	errno = err;
	return fd;
}

static int answer_open(struct talk *t, const unsigned char *body, size_t len, struct nw_err *e) {
	struct nw_guard *g = &t->run->guard;
	struct nw_reader r = { body, body + len };
	struct nw_field kind, path;
	struct stat st = { 0 };
	uint64_t k;
	char name[4096];
	struct nw_buf b;
	int fd, err;
	if (nw_next(&r, &kind) != 1 || kind.tag != 1 || nw_int(&kind, &k) || k < 1 || k > 4 || nw_next(&r, &path) != 1 || path.tag != 2 ||
		nw_is_string(&path, sizeof name - 1) || nw_next(&r, &kind) != 0)
		return lost(e, "asked for a file in a way that is not known");
	memcpy(name, path.value, path.len);
	name[path.len] = 0;
	bool image = k == 4;
	if (k == 1 || image) fd = open_for_caller(t->run, name, image ? 0 : O_NOFOLLOW);
	else fd = open_anchor(t->run, k == 2 ? g->ca_dir : g->voms_dir, name);
	err = fd < 0 ? errno : 0;
	if (fd >= 0 && fstat(fd, &st)) err = errno;
	else if (fd >= 0 && !S_ISREG(st.st_mode) && !(image && S_ISDIR(st.st_mode))) err = S_ISDIR(st.st_mode) ? EISDIR : EINVAL;
	else if (fd >= 0 && !image && st.st_size > CREDENTIAL_MAX) err = EFBIG;
	else if (fd >= 0 && image && keep_image(t->run, fd)) err = errno;
	nw_frame_begin(&b, NW_OPEN_MAX);
	nw_put_int(&b, 1, (uint64_t)err);
	nw_put_int(&b, 2, st.st_uid);
	nw_put_int(&b, 3, st.st_mode);
	nw_put_int(&b, 4, (uint64_t)st.st_size);
	nw_put_int(&b, 5, st.st_nlink);
	if (image && !err) nw_put_string(&b, 6, t->run->image.path);
	err = send_frame(t, &b, NW_OPENED, err ? -1 : fd, e);
	nwp_close(&fd);
	return err;
}

/* The child's side of fork: nothing of ours, nothing of the caller's, its own ids, no way back, then the interpreter. */
static void __attribute__((noreturn)) become_child(struct nw_run *r, pid_t us, int sock, const void *filter, size_t len) {
	const struct nw_guard *g = &r->guard;
	const struct {
		int resource;
		rlim_t max;
	} limit[] = { { RLIMIT_FSIZE, 0 }, { RLIMIT_CORE, 0 }, { RLIMIT_NOFILE, 64 }, { RLIMIT_AS, 1 << 30 }, { RLIMIT_CPU, 60 } };
	char *argv[] = { (char *)(uintptr_t)g->python, (char *)"-I", (char *)"-S", (char *)"-B", (char *)(uintptr_t)g->script, NULL };
	char *env[] = { (char *)"PATH=/usr/bin:/bin", (char *)"LC_ALL=C.UTF-8", NULL };
	struct sigaction dfl = { .sa_handler = SIG_DFL };
	int null = open("/dev/null", O_RDWR | O_CLOEXEC), high = fcntl(sock, F_DUPFD, 10);
	sigset_t none;
	sigemptyset(&none);
	if (null < 0 || high < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0 || dup2(high, 3) < 0) _exit(112);
	if (close_range(4, ~0u, 0) || setsid() < 0) _exit(113);
	for (size_t i = 0; i < sizeof limit / sizeof *limit; i++)
		if (setrlimit(limit[i].resource, &(struct rlimit){ limit[i].max, limit[i].max })) _exit(114);
	if (nwp_drop_bounding() || (r->launcher->privileged && nwp_become(g->child_uid, g->child_gid, false))) _exit(115);
	if (nwp_keep_caps(0) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != us) _exit(116);
	if (sigaction(SIGPIPE, &dfl, NULL) || sigaction(SIGXFSZ, &dfl, NULL) || sigprocmask(SIG_SETMASK, &none, NULL)) _exit(117);
	if (nw_lock(filter, len)) _exit(118);
	execve(g->python, argv, env);
	_exit(119);
}

static int spawn(struct talk *t, struct nw_err *e) {
	struct nw_run *r = t->run;
	uid_t owner = nwp_trusted_owner(r);
	char policy[2 * NW_PATH], lock[2 * NW_PATH];
	const char *const must[] = { r->guard.python, r->guard.script, policy, lock };
	pid_t us = getpid();
	int pair[2], fd;
	void *filter;
	size_t len;
	snprintf(policy, sizeof policy, "%s/policy.bin", r->guard.policy);
	snprintf(lock, sizeof lock, "%s/child-decide.bpf", r->guard.policy);
	for (size_t i = 0; i < sizeof must / sizeof *must; i++) {
		if ((fd = nwp_open_trusted(must[i], owner, O_PATH, e)) < 0) return -1;
		close(fd);
	}
	if (nwp_policy_file(r, "child-load.bpf", &filter, &len, e)) return -1;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) || (t->pid = fork()) < 0) {
		free(filter);
		return nw_fail(e, NW_INTERNAL, "NW-CHILD", "cannot start the policy child: %s", strerror(errno));
	}
	if (t->pid == 0) become_child(r, us, pair[1], filter, len);
	free(filter);
	close(pair[1]);
	t->sock = pair[0];
	return 0;
}

static int connect_resident(struct talk *t, struct nw_err *e) {
	const struct nw_guard *g = &t->run->guard;
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	struct ucred peer;
	socklen_t size = sizeof peer;
	if (snprintf(a.sun_path, sizeof a.sun_path, "%s", g->policyd) >= (int)sizeof a.sun_path)
		return nw_fail(e, NW_INTERNAL, "NW-POLICYD", "%s: too long for a socket; shorten policyd in the guard", g->policyd);
	t->sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (t->sock < 0 || connect(t->sock, (struct sockaddr *)&a, sizeof a))
		return nw_fail(e, NW_INTERNAL, "NW-POLICYD", "%s: %s; start \"nodewrap policyd\" or remove policyd from the guard", g->policyd,
			strerror(errno));
	if (getsockopt(t->sock, SOL_SOCKET, SO_PEERCRED, &peer, &size) || (peer.uid != nwp_trusted_owner(t->run) && peer.uid != 0))
		return nw_fail(e, NW_INTERNAL, "NW-POLICYD", "%s: not served by root but by uid %u", g->policyd, peer.uid);
	return 0;
}

static int exchange(struct talk *t, struct nw_err *e) {
	struct nw_caller *c = &t->run->caller;
	unsigned char header[NW_FRAME_HEADER], *body = NULL;
	uint32_t len, type;
	struct nw_buf b;
	nw_frame_begin(&b, NW_SMALL_MAX);
	nw_put_int(&b, 1, 1);
	nw_put_int(&b, 2, c->uid);
	nw_put_int(&b, 3, c->gid);
	nw_put_int(&b, 4, nw_wants_credentials(c->argc, c->argv, c->env));
	nw_put_string(&b, 5, t->run->guard.policy);
	if (send_frame(t, &b, NW_HELLO, -1, e)) return -1;
	if (nwp_build_request(t->run, &b, e)) {
		nw_buf_free(&b);
		return -1;
	}
	if (send_frame(t, &b, NW_REQUEST, -1, e)) return -1;
	nwp_meanwhile(t->run);
	for (int opens = 0;; opens++) {
		if (receive(t, header, sizeof header, e)) return -1;
		nw_frame_header(header, &len, &type);
		if (!(type == NW_OPEN && len <= NW_OPEN_MAX && opens < OPENS) && !(type == NW_DECISION && len <= NW_DECISION_MAX))
			return lost(e, "sent a frame that is not known or too long");
		body = malloc(2 * (size_t)len + 2); /* the frame, then room for its strings */
		if (!body) return lost(e, "sent more than there is memory for");
		int bad = receive(t, body, len, e);
		if (type == NW_DECISION) {
			t->run->said = body;
			return bad ? -1 : nw_decision_decode(body, len, (char *)body + len + 1, &t->run->decision, e);
		}
		bad = bad ? bad : answer_open(t, body, len, e);
		free(body);
		if (bad) return -1;
	}
}

/* The payload's credential is the payload's alone, once it has been forked. */
void nwp_forget_files(const struct nw_run *r) {
	for (int i = 0; i < r->decision.files; i++) {
		const struct nw_bytes *b = &r->decision.file[i].content;
		explicit_bzero((void *)(uintptr_t)b->p, b->len);
	}
}

int nwp_ask(struct nw_run *r, struct nw_err *e) {
	struct talk t = { r, -1, nwp_now_ms() + r->guard.deadline_ms, 0 };
	int bad = (r->guard.policyd[0] ? connect_resident(&t, e) : spawn(&t, e)) || exchange(&t, e);
	nwp_close(&t.sock);
	if (t.pid > 0) {
		int status = nwp_wait(t.pid, 0);
		if (bad && WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS) return lost(e, "did what its filter forbids (SIGSYS)");
		if (bad && WIFEXITED(status) && WEXITSTATUS(status) >= 112)
			return nw_fail(e, NW_INTERNAL, "NW-CHILD", "the policy child could not be jailed (step %d); see \"nodewrap doctor\"",
				WEXITSTATUS(status));
	}
	return bad ? -1 : 0;
}

/* From init's child to the payload: every right given away, in this order, and then exec. */
#include "run.h"

static void __attribute__((noreturn)) give_up(int sock, int code, int exit, const char *id, const char *what, const char *detail) {
	struct nw_msg m = { .what = NW_NEWS_ERROR };
	int err = errno;
	nw_fail(&m.err, exit, id, "%s %s: %s", what, detail, strerror(err));
	_exit(nwp_write_all(sock, &m, sizeof m) ? 125 : code);
}

static int write_file(const struct nw_file *f) {
	int fd = open(f->path, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, f->mode);
	struct stat st;
	bool bad = fd < 0 || fstat(fd, &st) || !S_ISREG(st.st_mode) || st.st_uid != geteuid() || st.st_nlink != 1 || fchmod(fd, f->mode) ||
		   ftruncate(fd, 0) || nwp_write_all(fd, f->content.p, f->content.len);
	if (fd >= 0 && bad && errno == 0) errno = EEXIST; /* somebody else's file, or not a file: never overwritten */
	if (fd >= 0 && close(fd)) bad = true;
	return bad ? -1 : 0;
}

/* The caller's own limits again, lowered to what the site allows. */
static int apply_limits(struct nw_run *r) {
	struct nw_decision *d = &r->decision;
	for (int i = 0; i < d->limits; i++) {
		if (d->limit[i].resource >= RLIM_NLIMITS) continue; /* limits.c: of the cgroup */
		struct rlimit *l = &r->caller.limit[d->limit[i].resource];
		rlim_t most = d->limit[i].value;
		if (l->rlim_cur > most) l->rlim_cur = most;
		/* SIGXCPU first, which tells what it was, then SIGKILL. Not past what there is of seconds: the sum would be none. */
		if (d->limit[i].resource == RLIMIT_CPU && __builtin_add_overflow(most, 1 + d->grace_ms / 1000, &most)) most = RLIM_INFINITY;
		if (l->rlim_max > most) l->rlim_max = most;
	}
	for (int i = 0; i < RLIM_NLIMITS; i++)
		if (setrlimit(i, &r->caller.limit[i])) return -1;
	return 0;
}

char **nwp_build_env(const struct nw_run *r) {
	const struct nw_decision *d = &r->decision;
	const struct nw_account *a = r->id.account;
	char **env = calloc((size_t)(d->keeps + d->sets + NW_ACCOUNT_SET) + 1, sizeof *env);
	int n = 0;
	for (int i = 0; env && i < d->keeps; i++) env[n++] = r->caller.env[d->keep[i]];
	for (int i = 0; env && i < d->sets; i++) env[n++] = (char *)(uintptr_t)d->set[i];
	for (int i = 0; env && a && i < a->sets; i++) env[n++] = (char *)(uintptr_t)a->set[i];
	return env;
}

/* The value of one that is there, else NULL. */
const char *nwp_env(char *const *env, const char *name) {
	size_t n = strlen(name);
	for (; *env; env++)
		if (strncmp(*env, name, n) == 0 && (*env)[n] == '=') return *env + n + 1;
	return NULL;
}

/* The words of a container's runtime, then the payload's own. */
static char **build_argv(struct nw_run *r) {
	struct nw_decision *d = &r->decision;
	char **own = r->caller.argv + d->argv_from, **argv;
	size_t n = (size_t)r->caller.argc - d->argv_from;
	if (!d->befores) return own;
	if (!(argv = calloc((size_t)d->befores + n + 1, sizeof *argv))) return NULL;
	for (int i = 0; i < d->befores; i++) argv[i] = (char *)(uintptr_t)d->before[i];
	memcpy(argv + d->befores, own, n * sizeof *own);
	return argv;
}

static int execute(const char *path, char **argv, char **env) {
	struct stat st;
	if (argv) return execve(path, argv, env);
	if (stat(path, &st)) return -1;
	if (S_ISREG(st.st_mode)) return access(path, X_OK);
	errno = EACCES;
	return -1;
}

/* A name without "/" is looked up in the payload's own PATH, with the payload's rights, like execvp(3) but without its shell fallback. Without argv:
 * 0 where it could be tried. */
int nwp_exec(const char *name, char **argv, char **env, bool search) {
	const char *path = nwp_env(env, "PATH");
	char full[4096];
	int err = ENOENT;
	if (!search || strchr(name, '/')) return execute(name, argv, env);
	if (!path) path = "/usr/local/bin:/usr/bin:/bin";
	for (const char *p = path; *name; p += strcspn(p, ":"), p += *p == ':') {
		size_t n = strcspn(p, ":");
		if (n && snprintf(full, sizeof full, "%.*s/%s", (int)n, p, name) < (int)sizeof full) {
			if (execute(full, argv, env) == 0) return 0;
			if (errno != ENOENT && errno != ENOTDIR) err = errno;
		}
		if (!p[n]) break;
	}
	errno = err;
	return -1;
}

int nw_exec_status(int err) {
	return err == ENOENT || err == ENOTDIR ? 127 : 126;
}

/* The work directory was entered with init's rights: a parent of it that only the pilot may pass is no obstacle. "." proves that the
 * directory itself is open to the payload. */
static int enter_directory(struct nw_run *r, bool in_work) {
	if (in_work && !r->decision.cwd) return chdir(".");
	const struct nw_decision *d = &r->decision;
	const char *first = d->cwd ? d->cwd : d->workdir;
	if (first) return chdir(first);
	if (r->id.account && r->id.account->home && chdir(r->id.account->home) == 0)
		return 0; /* a home that is missing is no reason to fail (glexec(1)) */
	return chdir("/tmp") ? chdir("/") : 0;
}

static int take_std(struct nw_run *r, int *sock) {
	int high = fcntl(*sock, F_DUPFD_CLOEXEC, 10);
	for (int i = 0; i < 3; i++)
		if (dup2(r->std[i], i) != i || (r->std[i] == i && fcntl(i, F_SETFD, 0))) return -1;
	if (high < 0 || dup2(high, 3) != 3 || fcntl(3, F_SETFD, FD_CLOEXEC)) return -1;
	if (r->inside >= 0 ? nwp_hand_over(r) : close_range(4, ~0u, 0)) return -1;
	*sock = 3;
	return 0;
}

static void change_ids(struct nw_run *r, int sock) {
	const struct nw_identity *id = &r->id;
	bool inside = r->userns >= 0 || r->decision.mode == NW_MAP, keep_groups = r->launcher->privileged || id->uid == r->caller.uid;
	uid_t uid = inside ? id->inside_uid : id->uid;
	gid_t gid = inside ? id->inside_gid : id->gid;
	if (nwp_drop_bounding() || nwp_become(uid, gid, keep_groups))
		give_up(sock, 125, NW_INTERNAL, "NW-IDS", "cannot become", "the payload's user");
}

/* With a pidfd of ours: whoever reads this later knows by it whether our number still is ours. Now, while no limit of the payload's is in the way:
 * it may have few descriptors, and its id too many on their way (unix(7), ETOOMANYREFS). Real root: the payload's user namespace is new at this
 * point and the launcher must write its maps. */
static void present(struct nw_run *r, int sock) {
	struct nw_msg m = { .what = NW_NEWS_BORN };
	int self = nwp_pidfd_open(getpid());
	char go;
	if (self < 0 || nwp_send_fd(sock, &m, sizeof m, self, 0) != (ssize_t)sizeof m)
		give_up(sock, 125, NW_INTERNAL, "NW-PAYLOAD", "no pidfd of", "the payload");
	close(self);
	if (r->launcher->privileged && r->decision.mode == NW_MAP && read(sock, &go, 1) != 1) _exit(125);
}

/* built: where init says that the root is there, in which all from there on is looked up. What comes before it is done beside init's work. */
void nwp_payload(struct nw_run *r, int sock, int built, const void *filter, size_t len) {
	struct nw_msg ready = { .what = NW_NEWS_READY };
	char **argv = build_argv(r), **env, go, loginuid[16];
	struct sigaction dfl = { .sa_handler = SIG_DFL };
	sigset_t none;
	snprintf(loginuid, sizeof loginuid, "%u", r->decision.mode == NW_MAP || r->userns >= 0 ? r->id.inside_uid : r->id.uid);
	if (setsid() < 0 || !argv || !(env = nwp_build_env(r))) give_up(sock, 125, NW_INTERNAL, "NW-PAYLOAD", "no session or memory for", "the payload");
	if (r->tty >= 0 && ioctl(r->tty, TIOCSCTTY, 0)) give_up(sock, 125, NW_INTERNAL, "NW-STDIO", "no controlling terminal for", "the payload");
	present(r, sock);
	/* Our "/" has changed with init's (pivot_root(2)). Without a word it is gone, and has told why. */
	if (read(built, &go, 1) != 1 || chdir("/")) _exit(125);
	/* Without privilege the file is ours only while we are dumpable (proc(5)). */
	if (!r->launcher->privileged) prctl(PR_SET_DUMPABLE, 1);
	ready.loginuid = nwp_write_file("/proc/self/loginuid", loginuid) == 0;
	if (!r->launcher->privileged && prctl(PR_SET_DUMPABLE, 0)) give_up(sock, 125, NW_INTERNAL, "NW-PAYLOAD", "prctl", "not dumpable");
	/* ENOSYS: a kernel without keys, or a filter that we share with the payload. Nothing is handed on either way. */
	ready.keyring = syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL) >= 0 || errno == ENOSYS;
	if (take_std(r, &sock)) give_up(sock, 125, NW_INTERNAL, "NW-PAYLOAD", "cannot arrange", "descriptors");
	struct stat st; /* the same directory: under its name the pilot may have put a link to one below what only root may pass */
	bool in_work = r->work.path && chdir(r->work.path) == 0 && stat(".", &st) == 0 && st.st_dev == r->work.dev && st.st_ino == r->work.ino;
	change_ids(r, sock);
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		give_up(sock, 125, NW_INTERNAL, "NW-PAYLOAD", "prctl", "no_new_privs");
	if (getppid() != r->init) _exit(125); /* init was killed before: without a namespace nobody else ends us */
	if (nwp_landlock(r)) give_up(sock, 125, NW_INTERNAL, "NW-LANDLOCK", "Landlock: rules of profile", r->profile.name);
	for (int i = 0; i < r->decision.files; i++)
		if (errno = 0, write_file(&r->decision.file[i])) give_up(sock, 125, NW_USAGE, "NW-FILE", "cannot write", r->decision.file[i].path);
	if (enter_directory(r, in_work))
		give_up(sock, 125, NW_USAGE, "NW-CWD", "cannot enter",
			r->decision.cwd       ? r->decision.cwd
			: r->decision.workdir ? r->decision.workdir
					      : "/");
	umask(r->decision.umask);
	if (apply_limits(r)) give_up(sock, 125, NW_INTERNAL, "NW-LIMIT", "cannot set", "resource limits");
	if (nwp_write_all(sock, &ready, sizeof ready)) _exit(125);
	/* While the launcher records the start: the kernel translates the filter, which takes 0.1 ms. */
	if (filter && nw_lock(filter, len)) give_up(sock, 125, NW_INTERNAL, "NW-SECCOMP", "the kernel refused the filter of", r->profile.name);
	if (read(sock, &go, 1) != 1) give_up(sock, 125, NW_INTERNAL, "NW-PAYLOAD", "no word to start for", "the payload");
	if (!argv[0]) /* glexec without a command: the files were all that was asked for */
		_exit(0);
	sigemptyset(&none);
	if (sigaction(SIGPIPE, &dfl, NULL) || sigaction(SIGXFSZ, &dfl, NULL) || sigprocmask(SIG_SETMASK, &none, NULL))
		give_up(sock, 125, NW_INTERNAL, "NW-PAYLOAD", "signals", "");
	nwp_exec(argv[0], argv, env, r->decision.search);
	if (r->decision.befores) give_up(sock, 125, NW_INTERNAL, "NW-APPTAINER", "cannot execute (see \"nodewrap doctor\")", argv[0]);
	give_up(sock, nw_exec_status(errno), nw_exec_status(errno), "NW-EXEC", "cannot execute", argv[0]);
}

/* Records (docs/audit.md): one write() a line, numbered without gaps, durable where asked, never torn. And --status-fd. */
#include "run.h"
#include "json.h"

#define LINE 4096 /* one record at most; longer argument lists are cut */
#define LOCK_MS 30000
#define STATUS_MS 2000
#define SEQUENCE "{\"event\":{\"sequence\":"

static void timestamp(char *to, size_t size, uint64_t us) {
	time_t s = (time_t)(us / 1000000);
	struct tm tm;
	char date[32];
	gmtime_r(&s, &tm);
	strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S", &tm);
	snprintf(to, size, "%s.%06uZ", date, (unsigned)(us % 1000000));
}

static void put_id(struct nw_json *j, const char *path, uint32_t id) {
	char s[16];
	snprintf(s, sizeof s, "%u", id);
	nw_json_string(j, path, s);
}

/* The child's facts below one object; a repeated key becomes a list. */
static void put_facts(struct nw_json *j, const struct nw_decision *d, const char *object) {
	size_t n = strlen(object);
	for (int i = 0; i < d->facts; i++) {
		const char *list[NW_FACTS];
		int items = 0;
		bool many, before = false;
		const char *path = nw_fact_path(d->fact[i].key, &many);
		for (int k = 0; k < i; k++) before |= strcmp(d->fact[k].key, d->fact[i].key) == 0;
		if (before || strncmp(path, object, n) || path[n] != '.' || strchr(path + n + 1, '.')) continue;
		if (!many) {
			nw_json_string(j, path, d->fact[i].value);
			continue;
		}
		for (int k = i; k < d->facts; k++)
			if (strcmp(d->fact[k].key, d->fact[i].key) == 0) list[items++] = d->fact[k].value;
		nw_json_strings(j, path, list, items);
	}
}

static void put_process(struct nw_json *j, struct nw_run *r, bool ended) {
	struct nw_caller *c = &r->caller;
	uint64_t from = r->decision.verdict == NW_PERMIT ? r->decision.argv_from : 0;
	char s[40];
	nw_json_string(j, "process.entity_id", r->run);
	if (r->payload) nw_json_int(j, "process.pid", r->payload);
	if (from < (uint64_t)c->argc) {
		nw_json_string(j, "process.executable", c->argv[from]);
		nw_json_strings(j, "process.args", (const char *const *)c->argv + from, c->argc - (int)from);
	}
	put_facts(j, &r->decision, "process");
	if (r->started_us && !r->swept) { /* a lease knows only when it was written */
		timestamp(s, sizeof s, r->started_us);
		nw_json_string(j, "process.start", s);
	}
	if (ended && r->ended) {
		nw_json_int(j, "process.exit_code", WIFEXITED(r->status) ? WEXITSTATUS(r->status) : 128 + WTERMSIG(r->status));
		if (WIFSIGNALED(r->status)) nw_json_int(j, "process.signal", WTERMSIG(r->status));
	}
	if (ended) nw_json_string(j, "process.ended_by", r->why ? r->why : r->swept ? "swept" : r->ended ? "exit" : NULL);
}

static void put_isolation(struct nw_json *j, struct nw_run *r) {
	static const char *const kind[] = { "pid", "ipc", "uts", "cgroup", "mount", "net" }, *const how[] = { "plain", "idmap", "chown" };
	const char *on[8];
	int n = 0;
	for (int i = 0; i < 6; i++)
		if (r->profile.namespaces & 1u << i) on[n++] = kind[i];
	if (r->userns >= 0 || r->decision.mode == NW_MAP) on[n++] = "user";
	nw_json_strings(j, "nodewrap.isolation.namespaces", on, n);
	nw_json_bool(j, "nodewrap.isolation.seccomp", r->profile.seccomp[0]);
	nw_json_bool(j, "nodewrap.isolation.own_cgroup", r->cgroup[0]);
	if (r->decision.workdir) nw_json_string(j, "nodewrap.isolation.workdir", how[r->how]);
	if (!(r->profile.namespaces & NW_NS_MOUNT) && r->decision.mode == NW_LOG_ONLY)
		nw_json_bool(j, "nodewrap.isolation.pilot_secrets_exposed", true);
	if (r->payload) {
		nw_json_bool(j, "nodewrap.isolation.loginuid", r->loginuid);
		nw_json_bool(j, "nodewrap.isolation.keyring", r->keyring);
	}
	if (r->degrades) nw_json_strings(j, "nodewrap.degrade", r->degrade, r->degrades);
}

static void put_cleanup(struct nw_json *j, struct nw_run *r) {
	struct nw_tally *t = &r->tally;
	const char *left[4];
	int n = 0;
	for (; n < 4 && t->left_path[n][0]; n++) left[n] = t->left_path[n];
	nw_json_int(j, "nodewrap.cleanup.killed", r->killed);
	nw_json_int(j, "nodewrap.cleanup.processes_left", r->left);
	nw_json_int(j, "nodewrap.cleanup.entries", (int64_t)t->entries);
	nw_json_int(j, "nodewrap.cleanup.left", (int64_t)t->left);
	nw_json_strings(j, "nodewrap.cleanup.left_paths", left, n);
	nw_json_int(j, "nodewrap.cleanup.removed", (int64_t)t->removed);
	nw_json_int(j, "nodewrap.cleanup.ipc", (int64_t)t->ipc);
	nw_json_int(j, "nodewrap.cleanup.keyrings", (int64_t)t->keys);
	nw_json_int(j, "nodewrap.cleanup.shared", (int64_t)t->shared);
	if (t->by_time) nw_json_bool(j, "nodewrap.cleanup.by_lease_time", true);
	nw_json_int(j, "nodewrap.cleanup.neutralised.symlinks", (int64_t)t->symlinks);
	nw_json_int(j, "nodewrap.cleanup.neutralised.special", (int64_t)t->special);
	nw_json_int(j, "nodewrap.cleanup.neutralised.suid", (int64_t)t->suid);
	nw_json_int(j, "nodewrap.cleanup.neutralised.foreign", (int64_t)t->foreign);
}

static void put_usage(struct nw_json *j, struct nw_run *r) {
	const struct rusage *u = &r->usage;
	char s[40];
	snprintf(s, sizeof s, "%ld.%06ld", u->ru_utime.tv_sec + u->ru_stime.tv_sec + (u->ru_utime.tv_usec + u->ru_stime.tv_usec) / 1000000,
		(u->ru_utime.tv_usec + u->ru_stime.tv_usec) % 1000000);
	nw_json_string(j, "nodewrap.usage.cpu_s", s);
	snprintf(s, sizeof s, "%llu.%03llu", (unsigned long long)(r->end_mono_ms - r->start_mono_ms) / 1000,
		(unsigned long long)(r->end_mono_ms - r->start_mono_ms) % 1000);
	nw_json_string(j, "nodewrap.usage.wall_s", s);
	nw_json_int(j, "nodewrap.usage.rss_kb", u->ru_maxrss);
}

static size_t compose(struct nw_run *r, const char *action, const struct nw_err *why, uint64_t sequence, size_t cap, char *line, size_t max) {
	const struct nw_decision *d = &r->decision;
	bool permit = d->verdict == NW_PERMIT, ended = strcmp(action, "exit") == 0, failed = why || r->left || (ended && r->status);
	struct nw_json j;
	char s[40];
	nw_json_begin(&j, line, max, cap);
	nw_json_int(&j, "event.sequence", (int64_t)sequence);
	nw_json_string(&j, "event.action", action);
	nw_json_string(&j, "event.kind", why || d->alarm ? "alert" : "event");
	nw_json_string(&j, "event.outcome", failed ? "failure" : ended && !r->ended ? "unknown" : "success");
	if (why) {
		nw_json_string(&j, "event.code", why->code);
		nw_json_string(&j, "event.message", why->text);
	}
	put_facts(&j, d, "event");
	timestamp(s, sizeof s, nwp_realtime_us());
	nw_json_string(&j, "@timestamp", s);
	nw_json_string(&j, "ecs.version", "8.11");
	nw_json_string(&j, "host.name", r->host);
	nw_json_string(&j, "host.boot.id", r->boot);
	if (permit && r->id.uid != (uid_t)-1) {
		put_id(&j, "user.id", r->id.uid);
		if (r->id.account) nw_json_string(&j, "user.name", r->id.account->name);
		put_id(&j, "user.group.id", r->id.gid);
	}
	put_process(&j, r, ended);
	put_facts(&j, d, "rule");
	nw_json_int(&j, "nodewrap.schema", 1);
	nw_json_string(&j, "nodewrap.run.id", r->run);
	nw_json_string(&j, "nodewrap.launcher", r->launcher->name);
	if (d->mode >= 0 && permit) {
		nw_json_string(&j, "nodewrap.mode", nw_mode_name[d->mode]);
		nw_json_string(&j, "nodewrap.profile", d->profile);
	}
	if (r->swept) nw_json_bool(&j, "nodewrap.swept", true);
	if (r->unrecorded) nw_json_bool(&j, "nodewrap.records_lost", true);
	put_facts(&j, d, "nodewrap");
	put_id(&j, "nodewrap.pilot.uid", r->caller.uid);
	put_id(&j, "nodewrap.pilot.gid", r->caller.gid);
	nw_json_int(&j, "nodewrap.pilot.pid", r->caller.ppid);
	put_facts(&j, d, "nodewrap.pilot");
	put_facts(&j, d, "nodewrap.subject");
	put_facts(&j, d, "nodewrap.policy");
	put_facts(&j, d, "nodewrap.declared");
	if (permit && !r->swept && strcmp(action, "authorize")) put_isolation(&j, r);
	if (ended && !r->swept) put_usage(&j, r);
	if (strcmp(action, "cleanup") == 0 || strcmp(action, "handover") == 0) put_cleanup(&j, r);
	return nw_json_end(&j);
}

/* The number of the last whole record, and where it ends: from the last bytes of the log. 0 when there is none. */
static int last_sequence(int fd, uint64_t *sequence, off_t *size, bool *torn) {
	char tail[2 * LINE + 1];
	struct stat st;
	ssize_t n;
	if (fstat(fd, &st)) return -1;
	*size = st.st_size;
	off_t from = st.st_size > (off_t)sizeof tail - 1 ? st.st_size - (off_t)sizeof tail + 1 : 0;
	n = pread(fd, tail, sizeof tail - 1, from);
	if (n < 0) return -1;
	tail[n] = 0;
	*torn = n > 0 && tail[n - 1] != '\n';
	*sequence = 0;
	for (char *p = tail; (p = strstr(p, SEQUENCE)) != NULL; p++)
		if ((p == tail || p[-1] == '\n') && memchr(p, '\n', (size_t)(tail + n - p))) *sequence = strtoull(p + sizeof SEQUENCE - 1, NULL, 10);
	return 0;
}

/* The counter file outlives rotation of the log; the log itself wins when a crash came between the two. */
static uint64_t counter(int fd, uint64_t set) {
	char s[32] = "";
	if (set) {
		snprintf(s, sizeof s, "%020llu\n", (unsigned long long)set);
		return pwrite(fd, s, 21, 0) == 21 ? set : 0;
	}
	return pread(fd, s, sizeof s - 1, 0) > 0 ? strtoull(s, NULL, 10) : 0;
}

static int append(int log, const char *line, size_t n, off_t before) {
	ssize_t w = write(log, line, n);
	if (w == (ssize_t)n) return 0;
	if (w >= 0) errno = ENOSPC;
	int err = errno;
	if (w > 0 && ftruncate(log, before)) err = EIO; /* the torn tail stays and is sealed by the next writer */
	errno = err;
	return -1;
}

static int seal(struct nw_run *r, int log, uint64_t *sequence, off_t *size) {
	struct nw_err torn = { .exit = 0, .code = "NW-AUDIT-TORN", .text = "a record before this one was cut short" };
	char line[LINE + 1] = "\n";
	size_t n = compose(r, "gap", &torn, *sequence + 1, 64, line + 1, LINE);
	if (n == 0 || append(log, line, n + 1, *size)) return -1;
	*sequence += 1;
	*size += (off_t)n + 1;
	return 0;
}

static void to_syslog(const char *line, size_t n, int severity) {
	struct sockaddr_un a = { .sun_family = AF_UNIX, .sun_path = "/dev/log" };
	int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	char m[LINE + 64];
	int h = snprintf(m, sizeof m, "<%d>nodewrap[%d]: %.*s", 10 << 3 | severity, (int)getpid(), (int)n, line);
	for (char *p = m; *p; p++)
		if ((unsigned char)*p < 0x20 || *p == 0x7f) *p = '?'; /* one line: records have no controls, glexec's line may */
	if (fd >= 0 && connect(fd, (struct sockaddr *)&a, sizeof a) == 0)
		send(fd, m, (size_t)h < sizeof m ? (size_t)h : sizeof m - 1, MSG_DONTWAIT | MSG_NOSIGNAL);
	nwp_close(&fd); /* the file is the record; syslog is a copy that may be lost (I15 of rsyslog's rate limits) */
}

static int open_log(struct nw_run *r, int *count, struct nw_err *e) {
	const char *path = r->guard.audit, *slash = strrchr(path, '/');
	char dir[NW_PATH];
	int log = -1, at;
	*count = -1;
	snprintf(dir, sizeof dir, "%.*s", (int)(slash - path), path);
	at = nwp_open_trusted(slash == path ? "/" : dir, nwp_trusted_owner(r), O_PATH | O_DIRECTORY, e);
	if (at < 0) return -1;
	log = openat(at, slash + 1, O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, 0640);
	if (log >= 0) {
		snprintf(dir, sizeof dir, "%.200s.sequence", slash + 1);
		*count = openat(at, dir, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	}
	int err = errno;
	close(at);
	if (log >= 0 && *count >= 0) return log;
	nwp_close(&log);
	nwp_close(count);
	return nw_fail(e, NW_INTERNAL, "NW-AUDIT", "%s: %s; see audit in the guard", path, strerror(err));
}

/* Everybody's records wait for this lock: who is stopped or frozen with it must not hang the whole node. */
static int lock(int count) {
	uint64_t deadline = nwp_now_ms() + LOCK_MS;
	while (flock(count, LOCK_EX | LOCK_NB)) {
		if (errno != EWOULDBLOCK && errno != EINTR) return -1;
		if (nwp_now_ms() > deadline) return errno = ETIMEDOUT, -1;
		usleep(500);
	}
	return 0;
}

/* 0, or an errno. */
static int record(struct nw_run *r, const char *action, const struct nw_err *why, bool sync, int log, int count) {
	char line[LINE];
	uint64_t last = 0;
	off_t size;
	bool torn;
	size_t n = 0;
	int bad = -1;
	if (lock(count)) return errno;
	if (last_sequence(log, &last, &size, &torn)) goto out;
	if (counter(count, 0) > last) last = counter(count, 0);
	if (torn && seal(r, log, &last, &size)) goto out;
	/* What does not fit is written again with less of what callers say; docs/audit.md has the rule. */
	for (size_t cap = LINE; n == 0 && cap >= 64; cap /= 2) n = compose(r, action, why, last + 1, cap, line, sizeof line);
	if (n == 0) {
		errno = EMSGSIZE;
		goto out;
	}
	bad = append(log, line, n, size) || !counter(count, last + 1) || (sync && fdatasync(log));
out:
	bad = bad ? errno : 0;
	flock(count, LOCK_UN);
	if (n && r->guard.syslog) to_syslog(line, n - 1, why ? 4 : 6);
	return bad;
}

/* In a process that is wholly root's: our own real id is the caller's, whose SIGSTOP would keep the lock from every other run. */
static int record_apart(struct nw_run *r, const char *action, const struct nw_err *why, bool sync, int log, int count) {
	pid_t p = r->launcher->privileged && r->role != NW_KEEPER ? fork() : -1;
	if (p < 0) return record(r, action, why, sync, log, count);
	if (p == 0) _exit(setresuid(0, 0, 0) ? errno : record(r, action, why, sync, log, count));
	int status = nwp_wait(p, -1);
	return WIFEXITED(status) ? WEXITSTATUS(status) : EIO;
}

int nwp_record(struct nw_run *r, const char *action, const struct nw_err *why, bool sync, struct nw_err *e) {
	int count, log = open_log(r, &count, e), bad = log < 0 ? -1 : record_apart(r, action, why, sync, log, count);
	nwp_close(&log);
	nwp_close(&count);
	if (bad == 0) return 0;
	if (bad > 0) nw_fail(e, NW_INTERNAL, "NW-AUDIT", "%s: %s; free space or mend it (audit in the guard)", r->guard.audit, strerror(bad));
	r->unrecorded = true;
	if (r->guard.audit_on_failure == NW_AUDIT_DENY) return -1;
	*e = (struct nw_err){ 0 }; /* tolerated: not the run's own error */
	return 0;
}

void nwp_glexec_syslog(struct nw_run *r) {
	if (r->decision.syslog && r->guard.syslog) to_syslog(r->decision.syslog, strlen(r->decision.syslog), 6);
}

void nwp_status(struct nw_run *r, const char *event, const struct nw_err *why, int code) {
	struct nw_json j;
	char line[LINE];
	size_t n;
	if (r->decision.status_fd < 0) return;
	nw_json_begin(&j, line, sizeof line, 512);
	nw_json_string(&j, "event", event);
	nw_json_string(&j, "run", r->run);
	if (why && why->code[0]) {
		nw_json_string(&j, "code", why->code);
		nw_json_string(&j, "text", why->text);
	}
	if (r->decision.verdict == NW_PERMIT && r->decision.mode >= 0) {
		nw_json_string(&j, "mode", nw_mode_name[r->decision.mode]);
		nw_json_string(&j, "profile", r->decision.profile);
		if (r->degrades) nw_json_strings(&j, "degrade", r->degrade, r->degrades);
	}
	if (r->payload) nw_json_int(&j, "pid", r->payload);
	if (code >= 0) nw_json_int(&j, "exit", code);
	if (r->ended) {
		nw_json_string(&j, "by", r->why ? r->why : "exit");
		put_usage(&j, r);
		put_cleanup(&j, r);
	}
	n = nw_json_end(&j);
	/* By a child, and only so long: a pipe that the pilot keeps full must not keep the run, its limits and its end waiting. */
	pid_t p = n ? fork() : -1;
	if (p == 0) _exit(nwp_write_all(r->decision.status_fd, line, n) != 0);
	if (p > 0 && nwp_wait(p, STATUS_MS)) nwp_close(&r->decision.status_fd);
}

/* Records (docs/audit.md): one write() a line, numbered without gaps, durable where asked, never torn. And --status-fd. */
#include "run.h"
#include "json.h"

#define LINE 4096         /* one record at most; longer argument lists are cut */
#define COUNT 21          /* bytes of the counter file */
#define RESERVE (1 << 20) /* 250 runs end in it; behind the log and behind the counter */
#define AHEAD (64 << 10)  /* set aside beyond it, so that not every record has to */
#ifndef PATIENCE_MS
#define PATIENCE_MS 30000
#endif
#define STATUS_MS 2000
#define SEQUENCE "{\"event\":{\"sequence\":"

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
		if (strncmp(path, object, n) || path[n] != '.' || strchr(path + n + 1, '.')) continue;
		for (int k = 0; k < i; k++) before |= strcmp(d->fact[k].key, d->fact[i].key) == 0;
		if (before) continue;
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
		nw_utc(s, sizeof s, r->started_us);
		nw_json_string(j, "process.start", s);
	}
	if (ended && r->ended) {
		nw_json_int(j, "process.exit_code", WIFEXITED(r->status) ? WEXITSTATUS(r->status) : 128 + WTERMSIG(r->status));
		if (WIFSIGNALED(r->status)) nw_json_int(j, "process.signal", WTERMSIG(r->status));
	}
	if (ended) nw_json_string(j, "process.ended_by", r->why ? r->why : r->swept ? "swept" : r->ended ? "exit" : NULL);
}

static void put_isolation(struct nw_json *j, struct nw_run *r, bool began) {
	static const char *const kind[] = { "pid", "ipc", "uts", "cgroup", "mount", "net" }, *const how[] = { "plain", "idmap", "chown" };
	const char *on[8];
	int n = 0;
	for (int i = 0; i < 6; i++)
		if (r->profile.namespaces & 1u << i) on[n++] = kind[i];
	if (r->userns >= 0 || r->decision.mode == NW_MAP) on[n++] = "user";
	nw_json_strings(j, "nodewrap.isolation.namespaces", on, n);
	const char *private = r->launcher->privileged ? "private" : "pasta";
	nw_json_string(j, "nodewrap.isolation.network", r->address ? private : r->profile.namespaces & NW_NS_NET ? "none" : "host");
	if (r->address6[0]) nw_json_string(j, "nodewrap.isolation.ipv6", r->address6);
	nw_json_bool(j, "nodewrap.isolation.seccomp", r->profile.seccomp[0]);
	nw_json_bool(j, "nodewrap.isolation.own_cgroup", r->cgroup[0]);
	if (r->terminal) nw_json_bool(j, "nodewrap.isolation.own_terminal", true);
	if (r->decision.workdir) nw_json_string(j, "nodewrap.isolation.workdir", how[r->how]);
	if (!(r->profile.namespaces & NW_NS_MOUNT) && r->decision.mode == NW_LOG_ONLY)
		nw_json_bool(j, "nodewrap.isolation.pilot_secrets_exposed", true);
	if (r->payload && began) { /* what one that gave up had of it by then it has not told */
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
	nw_json_int(j, "nodewrap.cleanup.neutralised.flags", (int64_t)t->flags);
	nw_json_int(j, "nodewrap.cleanup.neutralised.acls", (int64_t)t->acls);
}

/* What its cgroup counted, where that held a limit. */
static void put_counts(struct nw_json *j, const struct nw_run *r) {
	if (r->memory_peak > 0) nw_json_int(j, "nodewrap.usage.memory_peak", r->memory_peak);
	if (r->oom_kills > 0) nw_json_int(j, "nodewrap.usage.oom_kills", r->oom_kills);
	if (r->forks_refused > 0) nw_json_int(j, "nodewrap.usage.forks_refused", r->forks_refused);
}

static void put_usage(struct nw_json *j, const struct nw_run *r) {
	const struct rusage *u = &r->usage;
	char s[40];
	snprintf(s, sizeof s, "%ld.%06ld", u->ru_utime.tv_sec + u->ru_stime.tv_sec + (u->ru_utime.tv_usec + u->ru_stime.tv_usec) / 1000000,
		(u->ru_utime.tv_usec + u->ru_stime.tv_usec) % 1000000);
	nw_json_string(j, "nodewrap.usage.cpu_s", s);
	snprintf(s, sizeof s, "%llu.%03llu", (unsigned long long)(r->end_mono_ms - r->start_mono_ms) / 1000,
		(unsigned long long)(r->end_mono_ms - r->start_mono_ms) % 1000);
	nw_json_string(j, "nodewrap.usage.wall_s", s);
	nw_json_int(j, "nodewrap.usage.rss_kb", u->ru_maxrss);
	const char *remote[32];
	for (int i = 0; i < r->remotes; i++) remote[i] = r->remote[i];
	if (r->remotes) nw_json_strings(j, "nodewrap.usage.connections", remote, r->remotes);
	put_counts(j, r);
}

static bool has_failed(const struct nw_run *r, const char *action, const struct nw_err *why) {
	bool ended = strcmp(action, "exit") == 0, cleaned = strcmp(action, "cleanup") == 0 || strcmp(action, "handover") == 0;
	return why || r->left || (ended && r->status) || (cleaned && r->tally.left);
}

static size_t compose(struct nw_run *r, const char *action, const struct nw_err *why, uint64_t sequence, size_t cap, char *line, size_t max) {
	const struct nw_decision *d = &r->decision;
	bool permit = d->verdict == NW_PERMIT, ended = strcmp(action, "exit") == 0;
	struct nw_json j;
	char s[40];
	nw_json_begin(&j, line, max, cap);
	nw_json_int(&j, "event.sequence", (int64_t)sequence);
	nw_json_string(&j, "event.action", action);
	nw_json_string(&j, "event.kind", why || d->alarm ? "alert" : "event");
	nw_json_string(&j, "event.outcome", has_failed(r, action, why) ? "failure" : ended && !r->ended ? "unknown" : "success");
	if (why) {
		nw_json_string(&j, "event.code", why->code);
		nw_json_string(&j, "event.message", why->text);
	}
	put_facts(&j, d, "event");
	nw_utc(s, sizeof s, nwp_realtime_us());
	nw_json_string(&j, "@timestamp", s);
	nw_json_string(&j, "ecs.version", "8.11");
	nw_json_string(&j, "host.name", r->host);
	nw_json_string(&j, "host.boot.id", r->boot);
	if (permit && r->id.uid != (uid_t)-1) {
		put_id(&j, "user.id", r->id.uid);
		if (r->id.account) nw_json_string(&j, "user.name", r->id.account->name);
		put_id(&j, "user.group.id", r->id.gid);
	}
	if (r->address) {
		snprintf(s, sizeof s, "%u.%u.%u.%u", r->address >> 24, r->address >> 16 & 255, r->address >> 8 & 255, r->address & 255);
		nw_json_string(&j, "source.ip", s);
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
	if (r->caller.uid != (uid_t)-1) put_id(&j, "nodewrap.pilot.uid", r->caller.uid), put_id(&j, "nodewrap.pilot.gid", r->caller.gid);
	nw_json_int(&j, "nodewrap.pilot.pid", r->caller.ppid);
	put_facts(&j, d, "nodewrap.pilot");
	put_facts(&j, d, "nodewrap.subject");
	put_facts(&j, d, "nodewrap.policy");
	put_facts(&j, d, "nodewrap.declared");
	put_facts(&j, d, "nodewrap.image");
	if (permit && !r->swept && strcmp(action, "authorize")) put_isolation(&j, r, !why);
	if (strcmp(action, "start") == 0) nwp_put_limits(&j, r);
	if (ended) (r->swept ? put_counts : put_usage)(&j, r);
	if (strcmp(action, "cleanup") == 0 || strcmp(action, "handover") == 0) put_cleanup(&j, r);
	return nw_json_end(&j);
}

/* The log and its counter, both locked, while one record is written. */
struct trail {
	int log, count;
	off_t size;    /* of the log */
	uint64_t last; /* number in use */
};

/* Everybody's records wait for this lock, but not for ever: its holder's disk may not answer. */
static int lock(int fd) {
	static uint64_t patience = PATIENCE_MS;
	uint64_t end = nwp_now_ms() + patience;
	while (flock(fd, LOCK_EX | LOCK_NB)) {
		if (errno != EWOULDBLOCK && errno != EINTR) return -1;
		if (nwp_now_ms() > end) return patience = 1000, errno = ETIMEDOUT, -1;
		usleep(500);
	}
	return 0;
}

/* Opened, locked, and still what its name means: it may have been rotated or removed while we waited. */
static int take(struct nw_run *r, int at, const char *name, int flags, struct nw_err *e) {
	struct stat st, now;
	for (int i = 0; i < 9; i++) {
		/* Without O_CREAT first: before Linux 6.12 a frozen file system keeps us here with it, and not at the lock, for so long only. */
		int fd = openat(at, name, flags);
		if (fd < 0 && errno == ENOENT) fd = openat(at, name, flags | O_CREAT, 0640);
		if (fd < 0) break;
		bool bad = nwp_check_trusted(fd, nwp_trusted_owner(r), r->guard.audit, name, &st, e);
		if (!bad && !S_ISREG(st.st_mode)) bad = nw_fail(e, NW_INTERNAL, "NW-AUDIT", "%s: %s is no regular file", r->guard.audit, name);
		if (!bad && (bad = lock(fd)))
			nw_fail(e, NW_INTERNAL, "NW-AUDIT", "%s is locked: somebody's record is being written all the time; look at its disk",
				r->guard.audit);
		if (!bad && fstatat(at, name, &now, AT_SYMLINK_NOFOLLOW) == 0 && now.st_dev == st.st_dev && now.st_ino == st.st_ino) return fd;
		close(fd);
		if (bad) return -1;
	}
	return nw_fail(e, NW_INTERNAL, "NW-AUDIT", "%s: %s: %s; see audit in the guard", r->guard.audit, name, strerror(errno));
}

/* Two locks, always in this order: whichever of the files is replaced, the other one still keeps two writers apart. */
static int open_trail(struct nw_run *r, struct trail *t, struct nw_err *e) {
	const char *path = r->guard.audit, *slash = strrchr(path, '/');
	const int flags = O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY;
	char name[NW_PATH + 16];
	snprintf(name, sizeof name, "%.*s", slash == path ? 1 : (int)(slash - path), path);
	int at = nwp_open_trusted(name, nwp_trusted_owner(r), O_PATH | O_DIRECTORY, e);
	if (at < 0) return -1;
	snprintf(name, sizeof name, "%s.sequence", slash + 1);
	t->count = take(r, at, name, flags, e);
	t->log = t->count < 0 ? -1 : take(r, at, slash + 1, flags | O_APPEND, e);
	close(at);
	return t->log < 0 ? -1 : 0;
}

/* The number of the last whole record: among the last bytes of the log; when nothing else knows it, anywhere. 0: there is none. */
static int last_number(struct trail *t, bool anywhere, bool *torn) {
	char part[2 * LINE];
	ssize_t n;
	for (off_t end = t->size, from = end; from > 0 && t->last == 0 && (anywhere || end == t->size); end -= LINE) {
		from = end > (off_t)sizeof part ? end - (off_t)sizeof part : 0;
		if ((n = pread(t->log, part, (size_t)(end - from), from)) <= 0) return -1;
		if (end == t->size) *torn = part[n - 1] != '\n';
		for (char *p = part, *to = part + n, *nl; (p = memmem(p, (size_t)(to - p), SEQUENCE, sizeof SEQUENCE - 1)); p++) {
			if ((p == part ? from > 0 : p[-1] != '\n') || !(nl = memchr(p, '\n', (size_t)(to - p))) || nl[-1] != '}') continue;
			uint64_t number = strtoull(p + sizeof SEQUENCE - 1, NULL, 10);
			if (number > 0 && number < INT64_MAX) t->last = number;
		}
	}
	return 0;
}

/* The counter outlives rotation of the log; the log wins when a crash came between the two. 0: this record has t->last + 1. */
static int find_number(struct nw_run *r, struct trail *t, bool *torn, struct nw_err *e) {
	char s[COUNT + 1] = "";
	struct stat st;
	ssize_t n = pread(t->count, s, COUNT, 0);
	uint64_t counted = n == COUNT && s[strspn(s, "0123456789")] == '\n' ? strtoull(s, NULL, 10) : UINT64_MAX;
	bool known = counted < INT64_MAX;
	t->last = 0;
	if (n < 0 || fstat(t->log, &st)) return -1;
	t->size = st.st_size;
	if (last_number(t, !known, torn)) return -1;
	if (n > 0 && !known && t->last == 0)
		return nw_fail(e, NW_INTERNAL, "NW-AUDIT", "%s.sequence is no number and the log has none; remove it to begin at 1", r->guard.audit);
	if (known && counted > t->last) t->last = counted;
	return 0;
}

static int count(const struct trail *t) {
	char s[COUNT + 1];
	snprintf(s, sizeof s, "%020llu\n", (unsigned long long)t->last);
	return pwrite(t->count, s, COUNT, 0) == COUNT ? 0 : -1;
}

/* Blocks behind the end of a file, which nobody else can take: room for the ends of the runs that are started (I6, I9). On a file system
 * without fallocate(2) there is none. */
static int set_aside(int fd, off_t from, off_t ahead) {
	struct stat st;
	if (fstat(fd, &st)) return -1;
	if (st.st_blocks * 512 >= from + RESERVE) return 0;
	if (ahead && fallocate(fd, FALLOC_FL_KEEP_SIZE, from, RESERVE + ahead) == 0) return 0;
	return fallocate(fd, FALLOC_FL_KEEP_SIZE, from, RESERVE) && errno != EOPNOTSUPP ? -1 : 0; /* the last of a disk */
}

static int append(struct trail *t, const char *line, size_t n, bool end) {
	struct stat st;
	if (nwp_write_all(t->log, line, n) == 0) {
		t->size += (off_t)n;
		t->last++;
		return 0;
	}
	int err = errno;
	if (fstat(t->log, &st) || (st.st_size > t->size && ftruncate(t->log, t->size))) err = EIO; /* the next writer seals what is left */
	/* A log that was rotated since has no room behind it: the counter's goes over to it (truncation also frees what lies behind the end). */
	if (end && (err == ENOSPC || err == EDQUOT) && ftruncate(t->count, COUNT) == 0) {
		(void)set_aside(t->log, t->size, 0);
		return append(t, line, n, false);
	}
	errno = err;
	return -1;
}

static int seal(struct nw_run *r, struct trail *t, bool end) {
	struct nw_err torn = { .exit = 0, .code = "NW-AUDIT-TORN", .text = "a record before this one was cut short" };
	char line[LINE + 2] = "!\n"; /* a line that lacks nothing but its end is no record either: its number is used again */
	size_t n = compose(r, "gap", &torn, t->last + 1, 64, line + 2, LINE);
	return n ? append(t, line, n + 2, end) : -1;
}

static void to_syslog(const char *line, size_t n, int severity) {
	struct sockaddr_un a = { .sun_family = AF_UNIX, .sun_path = "/dev/log" };
	int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	char m[LINE + 64];
	if (fd >= 0 && connect(fd, (struct sockaddr *)&a, sizeof a) == 0) {
		int h = snprintf(m, sizeof m, "<%d>nodewrap[%d]: %.*s", 10 << 3 | severity, (int)getpid(), (int)n, line);
		nw_plain(m); /* records have no controls, glexec's line may */
		send(fd, m, (size_t)h < sizeof m ? (size_t)h : sizeof m - 1, MSG_DONTWAIT | MSG_NOSIGNAL);
	}
	nwp_close(&fd); /* the file is the record; syslog is a copy that may be lost (I15 of rsyslog's rate limits) */
}

/* Syslog has what the log could not take: with the number 0, which no record has. */
static void copy_lost(struct nw_run *r, const char *action, const struct nw_err *why) {
	char line[LINE];
	size_t n = compose(r, action, why, 0, 64, line, sizeof line);
	if (n) to_syslog(line, n - 1, 3);
}

/* It may be there, and may not be after a power cut: who was told of neither must not say that nothing was written. */
static int unsure(const struct nw_run *r, const char *why, struct nw_err *e) {
	return nw_fail(e, NW_INTERNAL, NW_UNSURE, "%s: a record may not be on disk: %s; mend it (audit in the guard)", r->guard.audit, why);
}

static int put(struct nw_run *r, struct trail *t, const char *action, const struct nw_err *why, bool sync, struct nw_err *e) {
	bool end = r->started_us || r->swept, torn = false; /* the end of a run may use what was set aside when it began */
	char line[LINE];
	size_t n = 0;
	if (find_number(r, t, &torn, e)) return -1;
	if (!end && (set_aside(t->count, COUNT, 0) || set_aside(t->log, t->size, AHEAD))) return -1;
	if (torn && seal(r, t, end)) return -1;
	/* What does not fit is written again with less of what callers say; docs/audit.md has the rule. */
	for (size_t cap = LINE; n == 0 && cap >= 64; cap /= 2) n = compose(r, action, why, t->last + 1, cap, line, sizeof line);
	if (n == 0) return errno = EMSGSIZE, -1;
	if (append(t, line, n, end)) return -1;
	if (count(t)) return unsure(r, strerror(errno), e);
	flock(t->log, LOCK_UN); /* others need not wait for the disk */
	flock(t->count, LOCK_UN);
	if (sync && fdatasync(t->log)) return unsure(r, strerror(errno), e);
	if (r->guard.syslog) to_syslog(line, n - 1, why ? 4 : 6);
	return 0;
}

static int record(struct nw_run *r, const char *action, const struct nw_err *why, bool sync, struct nw_err *e) {
	struct trail t = { .log = -1, .count = -1 };
	int bad = open_trail(r, &t, e) || put(r, &t, action, why, sync, e);
	if (bad && !e->code[0])
		nw_fail(e, NW_INTERNAL, "NW-AUDIT", "%s: %s; free space or mend it (audit in the guard)", r->guard.audit, strerror(errno));
	nwp_close(&t.log);
	nwp_close(&t.count);
	return bad;
}

/* Who holds the locks must be out of the pilot's hands: wholly root (a real id of the pilot's obeys its SIGSTOP), and in no cgroup that
 * it may freeze, starve, limit, or move us out of: who owns a cgroup's directory may (delegation, cgroups(7)). */
static bool exposed(const struct nw_run *r) {
	char path[sizeof r->cgroup];
	struct stat st;
	if (!r->launcher->privileged) return false; /* its log is the pilot's own */
	if (r->role != NW_KEEPER || r->swept) return true;
	if (!r->cgroup[0]) return r->guard.cgroup[0]; /* no group of the run's own: then we are in the pilot's, whosever that is */
	snprintf(path, sizeof path, "%s", r->cgroup);
	for (char *end; (end = strrchr(path, '/')) && (size_t)(end - path) > strlen(r->guard.cgroup);) {
		*end = 0;
		if (stat(path, &st) || st.st_uid || st.st_mode & (S_IWGRP | S_IWOTH)) return true;
	}
	return false;
}

/* By a child in the top cgroup. */
static int record_apart(struct nw_run *r, const char *action, const struct nw_err *why, bool sync, struct nw_err *e) {
	struct clone_args a = { .flags = CLONE_INTO_CGROUP, .exit_signal = SIGCHLD };
	int said[2] = { -1, -1 }, top = r->guard.cgroup[0] ? open(r->guard.cgroup, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
	a.cgroup = (uint64_t)top;
	pid_t p = pipe2(said, O_CLOEXEC) ? -2 : top < 0 ? -1 : (pid_t)syscall(SYS_clone3, &a, sizeof a);
	if (p == -1) p = fork(); /* inside a container its top may be closed to processes (EBUSY) */
	if (p == 0) {
		if (setresuid(0, 0, 0)) _exit(1);
		record(r, action, why, sync, e);
		_exit(nwp_write_all(said[1], e, sizeof *e) != 0);
	}
	nwp_close(&top);
	nwp_close(&said[1]);
	if (p < 0) nw_fail(e, NW_INTERNAL, "NW-AUDIT", "no process to write a record was to be had: %s", strerror(errno));
	else if (read(said[0], e, sizeof *e) != sizeof *e) unsure(r, "the process that writes it was killed", e);
	nwp_close(&said[0]);
	if (p > 0) nwp_wait(p, -1);
	return e->exit;
}

int nwp_record(struct nw_run *r, const char *action, const struct nw_err *why, bool sync, struct nw_err *e) {
	struct nw_err said = { 0 };
	(exposed(r) ? record_apart : record)(r, action, why, sync, &said);
	if (said.exit == 0) return 0;
	*e = said;
	r->unrecorded = true;
	if (r->guard.syslog) copy_lost(r, action, why);
	if (r->guard.audit_on_failure == NW_AUDIT_DENY || r->swept) return -1; /* of a dead run there will be another try */
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
		if (r->terminal) nw_json_bool(&j, "terminal", true);
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
	pid_t us = getpid(), p = n ? fork() : -1;
	/* As the pilot, whose descriptor it is, in every id: a socket tells its reader the real one (unix(7), SCM_CREDENTIALS), and root is believed. */
	if (p == 0 && r->launcher->privileged && nwp_become(r->caller.uid, r->caller.gid, true)) _exit(1);
	if (p == 0 && (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != us)) _exit(1); /* it has the lease's lock */
	if (p == 0) _exit(nwp_write_all(r->decision.status_fd, line, n) != 0);
	if (p > 0 && nwp_wait(p, STATUS_MS)) nwp_close(&r->decision.status_fd);
}

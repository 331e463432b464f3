/* Limits on the run as a whole, held by its cgroup (docs/limits.md). What the node does not give there is left to the payload's own limits
 * (payload.c) where there is one that stands in, and said. At the end: what the kernel counted, and which limit it was that ended the run. */
#include "run.h"

#define SCRATCH_MS 5000
#define DYING_MS 200

/* In the order of enum nw_limit_kind. "processes" are the payload's: init comes on top. stands_in: the limit of each process that is set as well,
 * and lifted where it is not needed: RLIMIT_DATA counts what is mapped and not what is used, RLIMIT_NPROC other runs of the same id. */
static const struct {
	const char *name, *degrade, *file, *before, *behind;
	uint32_t stands_in;
} held[NW_LIMIT_END - NW_LIMIT_MEMORY] = {
	{ "memory", "limit-memory", "memory.max", "", "", RLIMIT_DATA },
	{ "swap", "limit-swap", "memory.swap.max", "", "", RLIM_NLIMITS },
	{ "processes", "limit-processes", "pids.max", "", "", RLIMIT_NPROC },
	{ "cpus", "limit-cpus", "cpu.max", "", " 100000", RLIM_NLIMITS },
	{ "cpu_weight", "limit-cpu_weight", "cpu.weight", "", "", RLIM_NLIMITS },
	{ "io_weight", "limit-io_weight", "io.weight", "default ", "", RLIM_NLIMITS },
	{ "scratch", "limit-scratch", NULL, NULL, NULL, RLIM_NLIMITS },
	{ "io_read", "limit-io_read", "io.max", "rbps=", "", RLIM_NLIMITS },
	{ "io_write", "limit-io_write", "io.max", "wbps=", "", RLIM_NLIMITS },
	{ "io_read_ops", "limit-io_read_ops", "io.max", "riops=", "", RLIM_NLIMITS },
	{ "io_write_ops", "limit-io_write_ops", "io.max", "wiops=", "", RLIM_NLIMITS },
};

static bool of_cgroup(const struct nw_limit *l) {
	return l->resource >= NW_LIMIT_MEMORY && l->resource != NW_LIMIT_SCRATCH;
}

static bool of_run(const struct nw_limit *l) {
	return l->resource >= NW_LIMIT_MEMORY && l->resource < NW_LIMIT_END;
}

static const struct nw_limit *asked(const struct nw_run *r, uint32_t resource) {
	for (int i = 0; i < r->decision.limits; i++)
		if (r->decision.limit[i].resource == resource) return &r->decision.limit[i];
	return NULL;
}

bool nwp_wants_cgroup(const struct nw_decision *d) {
	for (int i = 0; i < d->limits; i++)
		if (of_cgroup(&d->limit[i])) return true;
	return false;
}

/* A group has the controllers that its parent hands down. A parent that was delegated to the caller is the caller's to change, and so ours; one
 * that was not is the administrator's. */
static int hand_down(const struct nw_run *r, const char *file) {
	char word[32];
	struct stat st;
	if (fstatat(r->cgroup_fd, "..", &st, 0) || st.st_uid != r->caller.uid) return -1;
	snprintf(word, sizeof word, "+%.*s", (int)strcspn(file, "."), file);
	return nwp_cgroup(r, "../cgroup.subtree_control", word);
}

/* io.max has a line for each disk, and knows whole ones alone (block/blk-cgroup.c). All of the node's: a payload may write in many places. */
static int of_each_disk(const struct nw_run *r, const char *text) {
	DIR *d = opendir("/sys/block");
	int disks = 0;
	bool bad = false;
	for (struct dirent *x; d && !bad && (x = nwp_entry(d, &bad));) {
		char line[96], number[32] = "";
		snprintf(line, sizeof line, "%.80s/dev", x->d_name);
		int fd = x->d_name[0] == '.' ? -1 : openat(dirfd(d), line, O_RDONLY | O_CLOEXEC);
		if (fd < 0 || read(fd, number, sizeof number - 1) < 0) number[0] = 0; /* a disk that has just gone */
		nwp_close(&fd);
		if (!number[0]) continue;
		snprintf(line, sizeof line, "%.*s %s", (int)strcspn(number, "\n"), number, text);
		bad = nwp_cgroup(r, "io.max", line) != 0;
		disks++;
	}
	if (d) closedir(d);
	return bad || !disks ? -1 : 0;
}

static int set(const struct nw_run *r, const struct nw_limit *l, const char *text) {
	return l->resource >= NW_LIMIT_IO_READ ? of_each_disk(r, text) : nwp_cgroup(r, held[l->resource - NW_LIMIT_MEMORY].file, text);
}

static int hold(const struct nw_run *r, const struct nw_limit *l) {
	uint32_t k = l->resource - NW_LIMIT_MEMORY;
	uint64_t value = l->value + (l->resource == NW_LIMIT_PIDS && l->value < UINT64_MAX);
	char text[48];
	if (l->resource == NW_LIMIT_SCRATCH) return r->profile.namespaces & NW_NS_MOUNT ? 0 : -1; /* else it has the node's /tmp */
	if (r->cgroup_fd < 0) return -1;
	snprintf(text, sizeof text, "%s%llu%s", held[k].before, (unsigned long long)value, held[k].behind);
	/* What is written by way of memory is the group's whose memory it is (cgroups v2, "Writeback"). */
	bool writes = l->resource == NW_LIMIT_IO_WRITE || l->resource == NW_LIMIT_IO_WRITE_OPS;
	if (writes && faccessat(r->cgroup_fd, "memory.max", F_OK, 0) && hand_down(r, "memory.max")) return -1;
	if (set(r, l, text) && (hand_down(r, held[k].file) || set(r, l, text))) return -1;
	/* All of the run or nothing of it: what is left after the kernel has picked one process seldom notices. */
	return l->resource == NW_LIMIT_MEMORY ? nwp_cgroup(r, "memory.oom.group", "1") : 0;
}

/* Before anybody is in the group. */
int nwp_hold_limits(struct nw_run *r, struct nw_err *e) {
	struct nw_decision *d = &r->decision;
	for (int i = 0; i < d->limits; i++) {
		const struct nw_limit *l = &d->limit[i];
		if (!of_run(l)) continue;
		uint32_t k = l->resource - NW_LIMIT_MEMORY;
		if (hold(r, l) == 0) {
			r->held |= 1u << k;
			for (int n = 0; n < d->limits; n++)
				if (d->limit[n].resource == held[k].stands_in) d->limit[n].value = RLIM_INFINITY;
			continue;
		}
		if (l->must)
			return nw_fail(e, NW_INTERNAL, "NW-LIMIT-CGROUP",
				"nothing here holds the limit \"%s\", and limits.on_missing is \"refuse\" in the policy; see \"nodewrap doctor\"",
				held[k].name);
		if (r->degrades < NW_DEGRADES) r->degrade[r->degrades++] = held[k].degrade;
	}
	return 0;
}

void nwp_put_limits(struct nw_json *j, const struct nw_run *r) {
	char path[48];
	for (int i = 0; r->held && i < r->decision.limits; i++) {
		const struct nw_limit *l = &r->decision.limit[i];
		if (!of_run(l) || !(r->held & 1u << (l->resource - NW_LIMIT_MEMORY))) continue;
		snprintf(path, sizeof path, "nodewrap.limits.%s", held[l->resource - NW_LIMIT_MEMORY].name);
		nw_json_int(j, path, l->value > INT64_MAX ? INT64_MAX : (int64_t)l->value);
	}
}

/* The number behind key in a file of the group, or the file's only one. -1: the node does not count that. */
static int64_t counted(const struct nw_run *r, const char *file, const char *key) {
	char text[1024], *at = text;
	int fd = openat(r->cgroup_fd, file, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
	nwp_close(&fd);
	if (n <= 0) return -1;
	text[n] = 0;
	size_t len = strlen(key);
	while (at && !(strncmp(at, key, len) == 0 && (!len || at[len] == ' '))) at = (at = strchr(at, '\n')) ? at + 1 : NULL;
	return at ? (int64_t)strtoull(at + len, NULL, 10) : -1;
}

/* Sizes the work directory and the run's own on disk, with the pilot's rights where it is the pilot's on disk, and what its owner closed too: whoever
 * may not read there does not see what is there. */
static void __attribute__((noreturn)) measure(struct nw_run *r, uint64_t most, pid_t us) {
	struct nw_tally t = { 0 };
	struct nw_walk w = { .top = "", .measure = true };
	const uint64_t look = 1ull << CAP_DAC_READ_SEARCH;
	bool root = r->launcher->privileged, inside = r->userns >= 0;
	int disk = r->disk[0] ? open(r->disk, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC) : -1;
	if (inside && setns(r->userns, CLONE_NEWUSER)) _exit(2);
	if (root && r->how != NW_CHOWN ? nwp_keep_chown(r->caller.uid, r->caller.gid, look) : (root || inside) && nwp_keep_caps(look)) _exit(2);
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != us) _exit(2); /* it has the lease's lock */
	if (r->work.fd >= 0) nwp_tree(r->work.fd, &w, &t);
	if (disk >= 0) nwp_tree(disk, &w, &t);
	_exit(t.bytes > most);
}

void nwp_scratch_begin(const struct nw_run *r, struct nw_scratch *s) {
	const struct nw_limit *l = asked(r, NW_LIMIT_SCRATCH);
	if (l && (r->work.fd >= 0 || r->disk[0])) s->next = nwp_now_ms() + SCRATCH_MS, s->most = l->value;
}

/* A look every few seconds, and ever more seldom where it takes long. True: too large. */
bool nwp_look_at_scratch(struct nw_run *r, struct nw_scratch *s) {
	uint64_t now = nwp_now_ms();
	int status;
	if (s->pid > 0 && waitpid(s->pid, &status, WNOHANG) == s->pid) {
		s->pid = 0;
		s->next = now + (now - s->began > SCRATCH_MS / 20 ? 20 * (now - s->began) : SCRATCH_MS);
		return WIFEXITED(status) && WEXITSTATUS(status) == 1;
	}
	if (s->pid > 0 || now < s->next) return false;
	pid_t us = getpid();
	s->began = now;
	if ((s->pid = fork()) == 0) measure(r, s->most, us);
	s->next = now + SCRATCH_MS / 50; /* is it done? */
	return false;
}

/* Whoever looks may wait for a file system that does not answer, and then does not die: not before the payload does. */
void nwp_scratch_end(const struct nw_scratch *s) {
	if (s->pid <= 0) return;
	struct pollfd end = { nwp_pidfd_open(s->pid), POLLIN, 0 };
	kill(s->pid, SIGKILL);
	poll(&end, 1, DYING_MS);
	nwp_close(&end.fd);
	waitpid(s->pid, NULL, WNOHANG);
}

/* The size of a file system in memory: the profile's, or less. */
uint64_t nwp_scratch(const struct nw_run *r, uint64_t size) {
	const struct nw_limit *l = asked(r, NW_LIMIT_SCRATCH);
	return l && l->value && l->value < size ? l->value : size; /* tmpfs(5): size=0 is no limit */
}

/* When nobody is in the group any more and it is there still. With memory.oom.group a kill for want of memory is one of the whole run. */
void nwp_count(struct nw_run *r) {
	bool killed = !r->ended || (WIFSIGNALED(r->status) && WTERMSIG(r->status) == SIGKILL), undecided = !r->why || r->swept;
	if (r->cgroup_fd >= 0 && (r->held || r->swept)) {
		r->oom_kills = counted(r, "memory.events", "oom_kill");
		r->memory_peak = counted(r, "memory.peak", "");
		r->forks_refused = counted(r, "pids.events", "max");
		if (undecided && killed && r->oom_kills > 0) r->why = counted(r, "memory.events", "oom") > 0 ? "oom" : "oom-outside";
	}
	if (r->why || !r->ended || !WIFSIGNALED(r->status)) return;
	if (WTERMSIG(r->status) == SIGXCPU && asked(r, RLIMIT_CPU)) r->why = "cpu";
	if (WTERMSIG(r->status) == SIGXFSZ && asked(r, RLIMIT_FSIZE)) r->why = "file_size";
}

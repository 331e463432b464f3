/* Step 8: end every process of the run, and prove it. Atomic means first (namespace init, cgroup.kill), never a walk by name (I22). */
#include "run.h"

#define PATIENCE_MS 10000 /* a process in uninterruptible sleep may take this long; then it is reported as left */
#define FUSE_MS 1000      /* and after this its FUSE connections are cut */
#define REAPED_MS 100     /* an init may take seconds to reap orphans; they are looked at instead */
#define KILLERS 4294967293u /* as in nodewrap/deep/owner.py; no guard may name it (guard.c, HIGHEST_ID) */

static bool populated(struct nw_run *r) {
	int fd = openat(r->cgroup_fd, "cgroup.events", O_RDONLY | O_CLOEXEC);
	char text[256] = "";
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
	nwp_close(&fd);
	return n > 0 && strstr(text, "populated 1");
}

static void kill_cgroup(struct nw_run *r) {
	if (r->cgroup_fd >= 0 && nwp_cgroup(r, "cgroup.kill", "1") && errno != ENOENT) r->left = 1; /* ENOENT: Linux before 5.14 */
}

/* Who waits for a FUSE server's answer does not die of KILL (fs/fuse/dev.c, request_wait_answer), and a payload can mount its own, in a user namespace,
 * and never answer. fusectl lists every connection of the node and cuts it; its owner is the mount's user_id, an id that its mounter has
 * (fs/fuse/inode.c, kuid_has_mapping). first..last are the run's alone; in its user namespace (userns launcher) they have their numbers from there. */
static void cut_fuse(const struct nw_run *r, uid_t first, uid_t last) {
	char path[NAME_MAX + sizeof "/abort"];
	struct stat st;
	pid_t p = fork();
	if (p > 0) nwp_wait(p, PATIENCE_MS);                             /* a list of many takes its time; no server is waited for */
	if (p) return;                                                   /* not even a process to be had: the same again in a moment */
	int dir = nwp_open_fs(r, "fusectl", "/sys/fs/fuse/connections"); /* -1: no FUSE here, or not for us */
	if (r->userns >= 0 && setns(r->userns, CLONE_NEWUSER)) _exit(1);
	DIR *d = dir < 0 ? NULL : fdopendir(dir);
	bool bad = false; /* those that were not seen get their turn in a moment, as long as anything waits */
	for (struct dirent *x; d && (x = nwp_entry(d, &bad));) {
		snprintf(path, sizeof path, "%s/abort", x->d_name);
		bool ours = fstatat(dir, x->d_name, &st, 0) == 0 && st.st_uid >= first && st.st_uid <= last;
		int fd = ours ? openat(dir, path, O_WRONLY | O_CLOEXEC) : -1;
		if (fd >= 0) nwp_write_all(fd, "1", 1); /* refused, as if there were none: what waits is reported as left */
		nwp_close(&fd);
	}
	_exit(bad);
}

/* While what was killed has not gone. Of an id that others use too nothing is cut: a connection may be theirs. */
static void cut_own(const struct nw_run *r) {
	const struct nw_identity *id = &r->id;
	bool in = r->userns >= 0;
	uid_t first = in ? id->inside_uid : id->first;
	if (id->lock >= 0) cut_fuse(r, first, in ? first : first + id->block - 1);
}

static void linger(const struct nw_run *r, uint64_t *next) {
	usleep(500);
	if (nwp_now_ms() < *next) return;
	cut_own(r);
	*next = nwp_now_ms() + FUSE_MS;
}

static bool init_gone(const struct nw_run *r, uint64_t deadline) {
	struct pollfd p = { r->init_fd, POLLIN, 0 };
	int n;
	while ((n = poll(&p, 1, FUSE_MS)) == 0 && nwp_now_ms() < deadline) cut_own(r);
	return n == 1;
}

static bool of_session(const char *text, uint32_t session) {
	return strtoul(text, NULL, 10) == session;
}

static bool of_uid(const char *text, uint32_t uid) {
	const char *line = strstr(text, "\nUid:"); /* the name, before it, has no newline (proc(5)) */
	unsigned real, effective, saved;
	return line && sscanf(line, "\nUid: %u %u %u", &real, &effective, &saved) == 3 && (real == uid || effective == uid || saved == uid);
}

/* Living processes, by a file of /proc/PID; they get sig. What it says of a pid is believed only of a process that has not ended afterwards:
 * then it was that one. A zombie, which its parent may never reap, has ended: its pidfd tells (pidfd_open(2)). How many were found. */
static int find(const char *file, bool (*match)(const char *, uint32_t), uint32_t id, int sig) {
	char path[PATH_MAX], text[1024];
	DIR *d = opendir("/proc");
	bool bad = !d; /* who was not seen may be there */
	int found = 0;
	for (struct dirent *x; d && (x = nwp_entry(d, &bad));) {
		pid_t p = (pid_t)strtol(x->d_name, NULL, 10);
		if (p <= 0) continue;
		struct pollfd end = { nwp_pidfd_open(p), POLLIN, 0 };
		snprintf(path, sizeof path, "/proc/%s/%s", x->d_name, file);
		int fd = end.fd < 0 ? -1 : open(path, O_RDONLY | O_CLOEXEC);
		bad |= fd < 0 && errno != ESRCH && errno != ENOENT && errno != EINVAL; /* gone; EINVAL: and a session has its number still (6.1) */
		ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
		text[n > 0 ? n : 0] = 0;
		if (n > 0 && match(text, id) && poll(&end, 1, 0) != 1) {
			found++;
			nwp_pidfd_signal(end.fd, sig);
		}
		nwp_close(&fd);
		nwp_close(&end.fd);
	}
	if (d) closedir(d);
	return found + bad;
}

/* The end of every process of one uid, from inside that uid, so that kill(-1) reaches nobody else. By the effective id alone at first: none of
 * them can kill, stop or trace us before they are killed (kill(2)); another killer can, as both have a real id. kill(-1) does not tell whether
 * it found any (kernel/signal.c: EPERM counts as success); the kernel's own count of the uid's processes does: with RLIMIT_NPROC at 2 a
 * fork succeeds only when we are the last (setrlimit(2)). Zombies count too, and their parent may never reap them; but kill(-1)
 * lets no fork pass, so who is counted after it has ended or is about to. UNPROVED: we were killed or stopped. */
static enum { ALONE, KILLED, UNPROVED } sweep(uid_t uid, gid_t gid) {
	pid_t p = fork(), q;
	if (p == 0) {
		if (setgroups(0, NULL) || setresgid(gid, gid, gid) || setresuid(KILLERS, uid, KILLERS) || nwp_keep_caps(0)) _exit(UNPROVED);
		kill(-1, SIGKILL); /* as root it would be everybody */
		if (nwp_become(uid, gid, true) || setrlimit(RLIMIT_NPROC, &(struct rlimit){ 2, 2 })) _exit(UNPROVED);
		for (uint64_t end = nwp_now_ms() + REAPED_MS; kill(-1, SIGKILL), (q = fork()) < 0; usleep(500))
			if (nwp_now_ms() > end) _exit(KILLED);
		if (q > 0) waitpid(q, NULL, 0);
		_exit(ALONE);
	}
	int status = p > 0 ? nwp_wait(p, 1000) : -1; /* not for ever: it may have been stopped */
	return WIFEXITED(status) ? WEXITSTATUS(status) : UNPROVED;
}

/* Mode map's processes are counted for root, who made their user namespace (kernel/ucount.c), and Linux 5.14 to 5.16 let there be one more than
 * the limit (8f2f9c4d82f2, "ucounts: Enforce RLIMIT_NPROC not RLIMIT_NPROC+1"): there it takes the look that else it takes for zombies. */
int nwp_sweep_uid(const struct nw_run *r, uid_t uid, gid_t gid) {
	uint64_t deadline = nwp_now_ms() + PATIENCE_MS;
	struct utsname u;
	bool counted = r->decision.mode != NW_MAP && uname(&u) == 0 && (strncmp(u.release, "5.1", 3) || u.release[3] < '4' || u.release[3] > '6');
	for (int told; (told = sweep(uid, gid)) != ALONE || !counted; usleep(500)) {
		if (told != UNPROVED && find("status", of_uid, uid, 0) == 0) break;
		if (nwp_now_ms() >= deadline) return -1;
		while (waitpid(-1, NULL, WNOHANG) > 0) /* a sweeper that was killed left its child to us, and a zombie counts too */
			;
		cut_fuse(r, uid, uid);
	}
	return 0;
}

/* Without a pid namespace the run's orphans become ours (PR_SET_CHILD_SUBREAPER): kill generation after generation until none is left. */
static int kill_children(struct nw_run *r, uint64_t deadline) {
	char text[4096];
	uint64_t next = nwp_now_ms() + FUSE_MS;
	int killed = 0;
	for (;;) {
		int fd = open("/proc/thread-self/children", O_RDONLY | O_CLOEXEC);
		ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
		pid_t p;
		nwp_close(&fd);
		text[n > 0 ? n : 0] = 0;
		for (char *s = text, *end; (p = (pid_t)strtol(s, &end, 10)) > 0 && *end; s = end)
			kill(p, SIGKILL); /* our own child: its pid cannot be another's before we reap it */
		while ((p = waitpid(-1, NULL, WNOHANG)) > 0) killed++;
		if (p < 0) return killed; /* ECHILD: counted to zero */
		if (nwp_now_ms() > deadline) {
			r->left = 1;
			return killed;
		}
		linger(r, &next);
	}
}

static void end_init(struct nw_run *r, uint64_t deadline) {
	int status, orphans;
	nwp_pidfd_signal(r->init_fd, SIGKILL);
	kill_cgroup(r);
	if (init_gone(r, deadline) && wait4(r->init, &status, 0, &r->usage) == r->init)
		r->init = 0; /* an init is reaped only after all of its namespace (pid_namespaces(7)) */
	else r->left = 1;
	nwp_network_end(r); /* it may be a child of ours that tells */
	orphans = kill_children(r, deadline);
	if (!(r->profile.namespaces & NW_NS_PID)) r->killed += orphans;
}

/* Of a run whose keeper was killed. Init, if it is there still, is dying: its pidfd tells when all of its namespace has gone (kernel/exit.c:
 * exit_notify empties it first). Without a namespace there may be anybody; the audit session is the kernel's mark on every descendant of the
 * payload, and nobody without CAP_AUDIT_CONTROL gets rid of it (audit(7)). */
static void end_orphans(struct nw_run *r, uint64_t deadline) {
	uint64_t next = nwp_now_ms() + FUSE_MS;
	if (r->init_fd >= 0) nwp_pidfd_signal(r->init_fd, SIGKILL);
	kill_cgroup(r);
	if (r->init_fd >= 0 && !init_gone(r, deadline)) r->left = 1;
	for (int found; r->session != AUDIT_SID_UNSET && (found = find("sessionid", of_session, r->session, SIGKILL)) > 0; linger(r, &next)) {
		r->killed += found;
		if (nwp_now_ms() < deadline) continue;
		r->left = 1;
		return;
	}
}

static bool cgroup_gone(const struct nw_run *r) {
	int fd = nwp_open_cgroup(r);
	bool gone = fd < 0 && errno == ENOENT;
	nwp_close(&fd);
	return gone;
}

/* The first group below that one, opened, with its name; -1: none. */
static int group_below(int dir, char name[static NAME_MAX + 1]) {
	int at = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), found = -1; /* of its own: the place of the reading is not shared */
	DIR *d = at < 0 ? NULL : fdopendir(at);
	bool bad = false; /* then none was found, and what is below keeps the one above: told as left */
	for (struct dirent *x; d && found < 0 && (x = nwp_entry(d, &bad));) {
		if (x->d_type != DT_DIR || !strcmp(x->d_name, ".") || !strcmp(x->d_name, "..")) continue;
		snprintf(name, NAME_MAX + 1, "%s", x->d_name);
		found = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	}
	if (d) closedir(d);
	else nwp_close(&at);
	return found;
}

/* Where the run's group is the payload's own id's (userns launcher) it can make groups below, in namespaces of its own. They are empty by now. */
static bool remove_lowest(int top) {
	char name[NAME_MAX + 1], next[NAME_MAX + 1];
	int above = -1, at = fcntl(top, F_DUPFD_CLOEXEC, 0);
	for (int below; at >= 0 && (below = group_below(at, next)) >= 0; at = below) {
		nwp_close(&above);
		above = at;
		memcpy(name, next, sizeof name);
	}
	bool removed = above >= 0 && unlinkat(above, name, AT_REMOVEDIR) == 0;
	nwp_close(&above);
	nwp_close(&at);
	return removed;
}

void nwp_end_processes(struct nw_run *r) {
	uint64_t deadline = nwp_now_ms() + PATIENCE_MS;
	bool any = r->init > 0 || r->swept;
	if (r->init > 0) end_init(r, deadline);
	if (r->swept) end_orphans(r, deadline);
	/* Leased ids of mode map occur nowhere but in the run's namespaces, which have just been seen to end. */
	bool proved = r->decision.mode == NW_MAP && r->profile.namespaces & NW_NS_PID;
	if (any && !proved && r->launcher->privileged && r->id.lock >= 0 && nwp_sweep_uid(r, r->id.uid, r->id.gid)) r->left = 1;
	while (r->cgroup[0] && populated(r) && nwp_now_ms() < deadline) usleep(500);
	nwp_count(r);
	if (!r->cgroup[0]) return;
	while (rmdir(r->cgroup) && errno == EBUSY && !cgroup_gone(r) && nwp_now_ms() < deadline)
		if (!remove_lowest(r->cgroup_fd)) usleep(500);
	nwp_close(&r->cgroup_fd);
	if (!cgroup_gone(r)) r->left = 1;
}

/* What we wrote for the payload where its view was the host's: removed with the payload's rights. -1: the attempt itself failed. */
static int remove_files(struct nw_run *r) {
	const struct nw_decision *d = &r->decision;
	if (!d->files || r->profile.namespaces & NW_NS_MOUNT) return 0;
	pid_t p = fork();
	if (p == 0) {
		bool inside = r->userns >= 0, root = r->launcher->privileged;
		if (inside && setns(r->userns, CLONE_NEWUSER)) _exit(1);
		if (root && nwp_keep_chown(r->id.uid, r->id.gid, 0)) _exit(1);
		if (!root && nwp_become(inside ? r->id.inside_uid : r->id.uid, inside ? r->id.inside_gid : r->id.gid, true)) _exit(1);
		for (int i = 0; i < d->files; i++)
			if (d->file[i].temporary && unlink(d->file[i].path) && errno != ENOENT) _exit(2);
		_exit(0);
	}
	int status = p > 0 ? nwp_wait(p, PATIENCE_MS) : -1;
	if (status == 0) return 0;
	snprintf(r->tally.left_path[r->tally.left & 3], sizeof r->tally.left_path[0], "%s", d->file[0].path);
	r->tally.left++;
	return WIFEXITED(status) && WEXITSTATUS(status) == 2 ? 0 : -1;
}

/* Only after the last process is gone: nobody changes the tree under the walk. -1: not for want of rights but cut short; to be done again. */
int nwp_hand_back(struct nw_run *r) {
	int bad = nwp_take_back(r);
	/* A work directory that could not be taken back may be an entry of a temporary directory, with the pilot's files. */
	bool stuck = r->how == NW_CHOWN && (bad || r->work.fd < 0 || r->tally.left);
	if (bad) {
		snprintf(r->tally.left_path[0], sizeof r->tally.left_path[0], "%s", r->work.path);
		r->tally.left++;
	}
	bad |= remove_files(r) | nwp_disk_remove(r);
	return nwp_clean_ipc(r, stuck) || bad ? -1 : 0;
}

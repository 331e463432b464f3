/* Step 8: what outlives its processes where a profile has no namespaces of its own (none): System V and POSIX IPC, files where everybody may
 * write, keyrings. Ids that are the run's alone leave nothing. Of an id that others use too (log-only: the pilot) only that goes which has
 * been made since the run came and which no living process uses; the record says so. */
#include "run.h"
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>

#define PATIENCE_MS 10000
#define COLUMNS 14
#define SEMS 256 /* of a set are looked at */
#define NS 1000000000

/* /proc/sysvipc: columns of the creator's uid (the owner's anybody may have set), of pids and behind them, of times; ctime is the last. */
static const struct kind {
	const char *name;
	int uid, pid, pids, time, ctime;
} kinds[] = { { "shm", 9, 4, 6, 11, 13 }, { "sem", 6, 0, 0, 8, 9 }, { "msg", 9, 5, 7, 11, 13 } };

struct job {
	struct nw_tally *tally;
	uid_t first, last; /* as the child sees them */
	bool whole;        /* the ids are the run's alone */
	bool alone;        /* else: no other run has the id now */
	bool stuck;        /* the work directory is not the pilot's again, and may be one of what is found */
	int64_t since;     /* ns */
	pid_t by;          /* who cleans no more when this has been killed: a sweep does, and then the id is another's */
	struct stat keep;  /* what glexec was asked to leave: the target proxy */
};

static void left(struct nw_tally *t, const char *what, long long id) {
	if (t->left < 4) snprintf(t->left_path[t->left], sizeof t->left_path[0], "%s %lld: %s", what, id, strerror(errno));
	t->left++;
}

static FILE *open_table(const struct kind *k) {
	char path[32], heading[512];
	snprintf(path, sizeof path, "/proc/sysvipc/%s", k->name);
	FILE *f = fopen(path, "re");
	if (f && !fgets(heading, sizeof heading, f)) rewind(f);
	return f;
}

/* The next line, or false: then f is closed, and bad set where it could not be read. */
static bool next(FILE *f, long long *n, bool *bad) {
	char line[512], *p = line;
	if (!f || !fgets(line, sizeof line, f)) return f && (*bad |= ferror(f), fclose(f), false);
	for (int i = 0; i < COLUMNS; i++) n[i] = strtoll(p, &p, 10);
	return true;
}

/* As System V stamps its objects. Not time(3): musl's is ahead of it, by up to a tick. */
static int64_t this_second(void) {
	struct timespec t = { 0 };
	clock_gettime(CLOCK_REALTIME_COARSE, &t);
	return t.tv_sec;
}

/* The last second in which an object of the id was made, or a queue used. */
static int64_t newest(const struct nw_run *r) {
	long long n[COLUMNS];
	int64_t at = 0;
	struct stat st;
	int queues = nwp_open_fs(r, "mqueue", "/dev/mqueue");
	bool bad = false; /* one that was not seen may be of this very second */
	for (const struct kind *k = kinds; k < kinds + 3; k++) {
		FILE *f = open_table(k);
		bad |= !f && errno != ENOENT;
		while (next(f, n, &bad))
			if (n[k->uid] == r->id.uid && n[k->ctime] > at) at = n[k->ctime];
	}
	DIR *d = queues < 0 ? NULL : fdopendir(queues);
	bad |= queues >= 0 && !d;
	for (struct dirent *x; d && (x = nwp_entry(d, &bad));)
		if (fstatat(queues, x->d_name, &st, 0) == 0 && st.st_uid == r->id.uid && st.st_mtime > at) at = st.st_mtime;
	if (d) closedir(d);
	return bad ? this_second() : at;
}

/* Runs that share an id hold one lock together; its file's time is when the first of them came, by the kernel's coarse clock like all times
 * that it is compared with. System V and queues have whole seconds: the first waits until nothing of the id is from this very one. Without
 * the lock, which another pilot may hold and be stopped, nothing is taken for the run's. */
int nwp_share_id(struct nw_run *r, int ids, struct nw_err *e) {
	char name[32];
	int bad = 0;
	if (r->id.lock >= 0 || r->profile.namespaces & NW_NS_IPC) return 0;
	snprintf(name, sizeof name, "%u.shared", r->id.uid);
	r->range = openat(ids, name, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (r->range >= 0 && flock(r->range, LOCK_EX | LOCK_NB) == 0) {
		for (int i = 0; i < 110 && newest(r) >= this_second(); i++) usleep(10000);
		bad = futimens(r->range, NULL);
	}
	if (r->range < 0 || bad) return nw_fail(e, NW_INTERNAL, "NW-STATE", "%s/ids/%s: %s", r->guard.state, name, strerror(errno));
	for (int i = 0; (bad = flock(r->range, LOCK_SH | LOCK_NB)) && i < PATIENCE_MS / 10; i++) usleep(10000);
	if (bad) nwp_close(&r->range);
	return 0;
}

static bool alive(long long pid) {
	return pid > 0 && (kill((pid_t)pid, 0) == 0 || errno != ESRCH);
}

/* By a living process, as far as the kernel tells: who made or last used it, and who has it attached (behind the pids of shm). */
static bool in_use(const struct kind *k, const long long *n) {
	for (int i = k->pid; i < k->pids; i++)
		if (alive(n[i])) return true;
	if (k == &kinds[0]) return n[6] > 0;
	for (int i = 0; k == &kinds[1] && i < n[3] && i < SEMS; i++) {
		int pid = semctl((int)n[1], i, GETPID);
		if (pid < 0 || alive(pid)) return true; /* closed even to its owner */
	}
	return false;
}

static int remove_object(const struct kind *k, int id) {
	return k == &kinds[0] ? shmctl(id, IPC_RMID, NULL) : k == &kinds[1] ? semctl(id, 0, IPC_RMID) : msgctl(id, IPC_RMID, NULL);
}

/* What is not there, or not for us, holds nothing of ours; else we are short of something, and all is to be done again. */
static void must(bool there) {
	if (!there && errno != ENOENT && errno != ENODEV && errno != EACCES && errno != EPERM) _exit(1);
}

static void clean_table(const struct job *j, const struct kind *k) {
	FILE *f = open_table(k);
	bool bad = false;
	must(f);
	for (long long n[COLUMNS]; next(f, n, &bad);) {
		bool ours = n[k->uid] >= j->first && n[k->uid] <= j->last;
		for (int i = k->time; i <= k->ctime; i++) ours &= j->whole || !n[i] || n[i] >= j->since / NS; /* used before: it was there */
		if (!ours) continue;
		if (!j->whole && (!j->alone || in_use(k, n))) j->tally->shared++;
		else if (remove_object(k, (int)n[1]) == 0) j->tally->ipc++;
		else if (errno != EINVAL && errno != EIDRM) left(j->tally, k->name, n[1]);
	}
	if (bad) _exit(1); /* what was not seen may be ours: all of it again, by the sweep */
}

/* Where the file system does not tell birth (queues, in seconds; tmpfs before Linux 5.18) nothing about it may be older. */
static bool made_since(const struct statx *x, int64_t since) {
	if (x->stx_mask & STATX_BTIME) return x->stx_btime.tv_sec * NS + x->stx_btime.tv_nsec >= since;
	return x->stx_mtime.tv_sec >= since / NS && x->stx_atime.tv_sec >= since / NS;
}

/* A write lease is given only to who has the file alone: nobody else has it open or mapped (fcntl(2)). */
static bool unused(int dir, const char *name) {
	int fd = openat(dir, name, O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);
	bool alone = fd >= 0 && fcntl(fd, F_SETLEASE, F_WRLCK) == 0;
	nwp_close(&fd);
	return alone;
}

static void clean_dir(const struct job *j, int dir, bool ipc) {
	struct nw_tally *t = j->tally, was = *t;
	struct statx x;
	if (j->whole) {
		nwp_remove_owned(dir, j->first, j->last, S_ISREG(j->keep.st_mode) ? &j->keep : NULL, t);
		t->entries = was.entries; /* of the work directory */
		if (ipc) t->ipc += t->removed - was.removed, t->removed = was.removed;
		return;
	}
	DIR *d = fdopendir(dup(dir));
	bool bad = !d;
	for (struct dirent *y; d && (y = nwp_entry(d, &bad));) {
		bool there = statx(dir, y->d_name, AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS | STATX_BTIME, &x) == 0;
		if (!there || x.stx_uid != j->first || !made_since(&x, j->since)) continue;
		if (ipc && j->alone && S_ISREG(x.stx_mode) && unused(dir, y->d_name) && unlinkat(dir, y->d_name, 0) == 0) t->ipc++;
		else t->shared++;
	}
	if (d) closedir(d);
	if (bad) _exit(1);
}

/* A user's keyrings stay in the kernel. What a payload has closed to its own user, nobody can open; invalidated, a ring is made anew. */
static void clear_keys(struct nw_tally *t) {
	long persistent = syscall(SYS_keyctl, KEYCTL_GET_PERSISTENT, -1, KEY_SPEC_PROCESS_KEYRING);
	long rings[] = { KEY_SPEC_USER_SESSION_KEYRING, KEY_SPEC_USER_KEYRING, persistent };
	for (int i = 0; i < (persistent < 0 ? 2 : 3); i++) {
		long held = syscall(SYS_keyctl, KEYCTL_READ, rings[i], NULL, 0);
		if (held < 0 && errno == ENOSYS) return;
		if (i < 2) syscall(SYS_keyctl, KEYCTL_SETPERM, rings[i], 0x1f3f0000); /* as the kernel makes them (process_keys.c) */
		if (syscall(SYS_keyctl, KEYCTL_CLEAR, rings[i]) && syscall(SYS_keyctl, KEYCTL_INVALIDATE, rings[i])) left(t, "keyring", rings[i]);
		else t->keys += held != (i ? 0 : 4); /* the session's has a link to the other one */
	}
	syscall(SYS_keyctl, KEYCTL_LINK, KEY_SPEC_USER_KEYRING, KEY_SPEC_USER_SESSION_KEYRING);
}

/* With the payload's rights (I8), in its user namespace when that is its launcher's to enter: ids have their numbers from inside there. */
static void __attribute__((noreturn)) clean(struct nw_run *r, struct job *j) {
	static const char *const dirs[] = { "/dev/shm", "/tmp", "/var/tmp" };
	bool ipc = !(r->profile.namespaces & NW_NS_IPC), files = !(r->profile.namespaces & NW_NS_MOUNT) && !j->stuck, in = r->userns >= 0;
	int queues = ipc ? nwp_open_fs(r, "mqueue", "/dev/mqueue") : -1;
	must(!ipc || queues >= 0);
	if (in && setns(r->userns, CLONE_NEWUSER)) _exit(1);
	/* Of an id that others have too only the effective one, which System V asks for: they cannot signal us (kill(2): the real and the saved one). */
	if (r->launcher->privileged && !j->whole) {
		if (setgroups(0, NULL) || setresgid(0, r->id.gid, 0) || setresuid(0, r->id.uid, 0) || nwp_keep_caps(0)) _exit(1);
	} else if (nwp_become(in ? r->id.inside_uid : r->id.uid, in ? r->id.inside_gid : r->id.gid, !r->launcher->privileged)) _exit(1);
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != j->by) _exit(1);
	for (int i = 0; ipc && i < 3; i++) clean_table(j, &kinds[i]);
	if (queues >= 0) clean_dir(j, queues, true);
	for (int i = 0; i < r->decision.files; i++)
		if (!r->decision.file[i].temporary && lstat(r->decision.file[i].path, &j->keep)) j->keep.st_mode = 0;
	for (int i = 0; files && i < 3; i++) {
		int dir = open(dirs[i], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		must(dir >= 0);
		if (dir >= 0) clean_dir(j, dir, i == 0);
	}
	if (j->whole && r->launcher->privileged && r->decision.mode == NW_SWITCH) clear_keys(j->tally);
	_exit(0);
}

/* Only after the last process is gone. No payload has another id than its own, not even of a block: it has no capability in its user namespace
 * and no_new_privs, and a map of more than itself takes CAP_SETUID outside (user_namespaces(7)). What of the block is found all the same and
 * cannot be removed is told. A sweep cannot know when a dead run ended, and so what of a shared id was the run's.
 * -1: cut short. */
int nwp_clean_ipc(struct nw_run *r, bool stuck) {
	const struct nw_identity *id = &r->id;
	bool in = r->userns >= 0, whole = id->lock >= 0;
	struct job j = { .first = in ? id->inside_uid : id->first, .whole = whole, .stuck = stuck, .by = getpid() };
	struct stat st = { 0 };
	j.last = in ? id->inside_uid : id->first + id->block - 1;
	if ((r->profile.namespaces & NW_NS_IPC && r->profile.namespaces & NW_NS_MOUNT) || !r->started_us || (r->swept && !whole)) return 0;
	j.alone = !whole && fstat(r->range, &st) == 0 && flock(r->range, LOCK_EX | LOCK_NB) == 0;
	j.since = !whole && r->range >= 0 ? st.st_mtim.tv_sec * NS + st.st_mtim.tv_nsec : (int64_t)r->started_us * 1000;
	j.tally = mmap(NULL, sizeof *j.tally, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, 0, 0);
	if (j.tally != MAP_FAILED) *j.tally = r->tally;
	pid_t p = j.tally == MAP_FAILED ? -1 : fork();
	if (p == 0) clean(r, &j);
	int bad = p < 0 || nwp_wait(p, whole ? -1 : PATIENCE_MS);
	if (j.tally != MAP_FAILED) r->tally = *j.tally;
	r->tally.by_time = !whole;
	if (bad) left(&r->tally, "IPC objects of uid", id->uid);
	if (j.alone) futimens(r->range, NULL); /* who waits for the lock comes after this */
	return bad ? -1 : 0;
}

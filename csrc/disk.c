/* Private directories on disk (profile line "disk"): a directory of the run below the guard's tmp-dir, which nobody but its owner may pass, and in
 * it one for each place, the payload's own. Named in the lease before it is made. */
#include "run.h"

#include <linux/quota.h>

/* linux/fs.h cannot be had together with sys/mount.h (glibc before 2.37) */
struct extended {
	uint32_t flags, extents, count, project, cow;
	unsigned char pad[8];
};
#define FS_IOC_FSGETXATTR _IOR('X', 31, struct extended)
#define FS_IOC_FSSETXATTR _IOW('X', 32, struct extended)
#define INHERITED 0x200 /* FS_XFLAG_PROJINHERIT */

static int quota(int command, int dir, uint32_t project, struct if_dqblk *q) {
	return (int)syscall(SYS_quotactl_fd, dir, QCMD(command, PRJQUOTA), project, q);
}

/* scratch, exactly, where the file system counts by project: that of the run has the number of its first id, which nobody else uses. For payloads in
 * a user namespace alone: in the first one the owner of a file may take it out of its project (fs/ioctl.c, fileattr_set_prepare). Elsewhere, and
 * where the number is in use already, limits.c looks at the size. */
static void hold_size(const struct nw_run *r, int dir) {
	uint64_t most = nwp_scratch(r, UINT64_MAX);
	struct if_dqblk now = { 0 }, limit = { .dqb_bhardlimit = most / 1024, .dqb_valid = QIF_BLIMITS };
	struct extended x;
	if (most == UINT64_MAX || !r->launcher->privileged || r->decision.mode != NW_MAP) return;
	if (quota(Q_GETQUOTA, dir, r->id.first, &now) || now.dqb_curinodes || ioctl(dir, FS_IOC_FSGETXATTR, &x)) return;
	x.project = r->id.first;
	x.flags |= INHERITED;
	if (ioctl(dir, FS_IOC_FSSETXATTR, &x) == 0) quota(Q_SETQUOTA, dir, r->id.first, &limit);
}

/* Before the directory goes, which tells that there is something to undo. A limit that stays all the same is nobody's: the next run of this id sets
 * its own. */
static void release_size(const struct nw_run *r, int dir) {
	struct if_dqblk none = { .dqb_valid = QIF_BLIMITS };
	struct extended x;
	if (!r->launcher->privileged || r->decision.mode != NW_MAP || ioctl(dir, FS_IOC_FSGETXATTR, &x) || x.project != r->id.first) return;
	quota(Q_SETQUOTA, dir, r->id.first, &none);
}

/* Only the name, and whether there is a place for it: the lease is first. */
int nwp_disk_path(struct nw_run *r, struct nw_err *e) {
	int i = 0, top;
	while (i < r->profile.n && r->profile.op[i].kind != NW_DISK) i++;
	if (i == r->profile.n) return 0;
	if (!r->guard.tmp_dir[0])
		return nw_fail(e, NW_INTERNAL, "NW-TMP-DIR", "profile %s has %s on disk, and %s names no tmp-dir; add that line or use tmpfs",
			r->profile.name, r->profile.op[i].path, r->guard_path);
	if ((top = nwp_open_trusted(r->guard.tmp_dir, nwp_trusted_owner(r), O_RDONLY | O_DIRECTORY, e)) < 0) return -1;
	close(top);
	snprintf(r->disk, sizeof r->disk, "%s/%s", r->guard.tmp_dir, r->run); /* 255 and 37 bytes at most: fits into a lease */
	return 0;
}

/* The run's own directory, or -1: it is not there (ENOENT, e->exit is 0), or cannot be had. */
static int open_run(struct nw_run *r, bool make, int *top, struct nw_err *e) {
	if ((*top = nwp_open_trusted(r->guard.tmp_dir, nwp_trusted_owner(r), O_RDONLY | O_DIRECTORY, e)) < 0) return -1;
	int fd = make && mkdirat(*top, r->run, 0700) ? -1 : openat(*top, r->run, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0 && (make || errno != ENOENT)) nw_fail(e, NW_INTERNAL, "NW-TMP-DIR", "%s: %s", r->disk, strerror(errno));
	return fd;
}

/* Nobody else may make anything there, by a descriptor that the payload gave away: nobody could remove it. A payload that is many ids, or one that
 * we cannot give it to, writes there as anybody. */
int nwp_disk_make(struct nw_run *r, struct nw_err *e) {
	bool root = r->launcher->privileged;
	mode_t mode = r->id.block == 1 && (root || r->id.uid == geteuid()) ? 01700 : 01777;
	char name[16];
	int top, dir = r->disk[0] ? open_run(r, true, &top, e) : -1, bad = 0;
	if (dir < 0) return r->disk[0] ? (nwp_close(&top), -1) : 0;
	hold_size(r, dir);
	for (int i = 0; !bad && i < r->profile.n; i++) {
		if (r->profile.op[i].kind != NW_DISK) continue;
		snprintf(name, sizeof name, "%d", i);
		bad = mkdirat(dir, name, 0700) || (root && fchownat(dir, name, r->id.uid, r->id.gid, AT_SYMLINK_NOFOLLOW)) ||
		      fchmodat(dir, name, mode, 0);
	}
	if (bad) nw_fail(e, NW_INTERNAL, "NW-TMP-DIR", "%s: %s", r->disk, strerror(errno));
	close(dir);
	close(top);
	return bad;
}

/* First what the payload made, with its rights (I8). What is left then is ours, places on which something was mounted: with our own, and the places. */
static void __attribute__((noreturn)) clear(struct nw_run *r, int dir, bool own, pid_t us, int out) {
	const struct nw_identity *id = &r->id;
	bool in = r->userns >= 0;
	uid_t first = own ? geteuid() : 0, last = own ? first : (uid_t)-1; /* whoever's, in a directory of the payload's */
	struct nw_tally t = { 0 };
	int place[NW_OPS], n = 0;
	DIR *d = nwp_list(dir);
	bool bad = false;
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != us || !d) _exit(1); /* it has the lease's lock */
	for (struct dirent *x; n < NW_OPS && (x = nwp_entry(d, &bad));)
		if (x->d_name[0] != '.' && (place[n++] = openat(dir, x->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)) < 0) _exit(2);
	if (bad || (!own && in && setns(r->userns, CLONE_NEWUSER))) _exit(3);
	if (!own && r->launcher->privileged && nwp_keep_chown(id->uid, id->gid, 0)) _exit(4);
	if (!own && !r->launcher->privileged && nwp_become(in ? id->inside_uid : id->uid, in ? id->inside_gid : id->gid, true)) _exit(4);
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != us) _exit(5); /* a change of ids took it away */
	for (int i = 0; i < n; i++) nwp_remove_owned(place[i], first, last, NULL, &t);
	if (own) rewinddir(d);
	for (struct dirent *x; own && (x = nwp_entry(d, &bad));)
		if (x->d_name[0] != '.') unlinkat(dir, x->d_name, AT_REMOVEDIR); /* if not, the run's directory tells */
	_exit(bad || nwp_write_all(out, &t, sizeof t));
}

static int clear_as(struct nw_run *r, int dir, bool own) {
	struct nw_tally t = { 0 };
	int fd[2];
	if (pipe2(fd, O_CLOEXEC)) return -1;
	pid_t us = getpid(), p = fork();
	if (p == 0) clear(r, dir, own, us, fd[1]);
	int bad = nwp_hear_walk(p, fd, &t);
	t.entries = t.removed = 0; /* those of a record are the work directory's */
	nwp_tally_add(&r->tally, &t);
	return bad;
}

/* Only after the last process is gone. -1: cut short, to be done again. What could not be removed is told. */
int nwp_disk_remove(struct nw_run *r) {
	struct nw_tally was = r->tally;
	struct nw_err e = { 0 };
	int top = -1, dir = r->disk[0] ? open_run(r, false, &top, &e) : -1, bad = e.exit ? -1 : 0;
	if (dir >= 0) bad = clear_as(r, dir, false) | clear_as(r, dir, true);
	if (dir >= 0) release_size(r, dir);
	if (dir >= 0 && !bad && unlinkat(top, r->run, AT_REMOVEDIR) == 0) r->tally = was; /* what the first of the two left, the second did not */
	else if (dir >= 0 && !bad && r->tally.left == was.left) bad = -1;
	if (bad) snprintf(r->tally.left_path[r->tally.left & 3], sizeof r->tally.left_path[0], "%.250s", r->disk), r->tally.left++;
	nwp_close(&dir);
	nwp_close(&top);
	return bad;
}

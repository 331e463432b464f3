/* A second wall behind the built root, by the payload on itself (landlock(7)): what the profile shows may be read and run, what it gives writable
 * may be written, TCP ports by list, nothing outside signalled. A kernel that cannot have it was dealt with before (isolate.c). */
#include "run.h"

/* By number: headers are older than kernels. Rights on files since ABI 1, of which REFER 2, TRUNCATE 3, IOCTL_DEV 5; ports 4; scopes 6. */
#define FS_EXECUTE (1ull << 0)
#define FS_WRITE_FILE (1ull << 1)
#define FS_READ_FILE (1ull << 2)
#define FS_READ_DIR (1ull << 3)
#define FS_TRUNCATE (1ull << 14)
#define FS_IOCTL_DEV (1ull << 15)
#define FS_READ (FS_EXECUTE | FS_READ_FILE | FS_READ_DIR)
#define FS_CHANGE (FS_WRITE_FILE | FS_TRUNCATE | FS_IOCTL_DEV)
#define FS_OF_FILE (FS_EXECUTE | FS_READ_FILE | FS_CHANGE)
#define NET_BIND 1ull
#define NET_CONNECT 2ull
#define SCOPE_ABSTRACT 1ull
#define SCOPE_SIGNALS 2ull
#define RULE_PATH 1
#define RULE_PORT 2

struct ruleset {
	uint64_t fs, net, scoped;
};

struct port_rule {
	uint64_t allowed, port;
};

struct wall {
	int fd;
	uint64_t fs; /* handled here */
};

/* What cannot be opened, or (EBADFD) lies on no file system, is nothing that a rule could open or close. */
static int allow(const struct wall *w, int at, uint64_t rights) {
	struct landlock_path_beneath_attr rule = { .parent_fd = at };
	struct stat st;
	if (fstat(at, &st)) return -1;
	rule.allowed_access = rights & w->fs & (S_ISDIR(st.st_mode) ? ~0ull : FS_OF_FILE);
	if (!rule.allowed_access) return 0;
	return syscall(SYS_landlock_add_rule, w->fd, RULE_PATH, &rule, 0) && errno != EBADFD ? -1 : 0;
}

static int allow_path(const struct wall *w, const char *path, uint64_t rights) {
	int at = open(path, O_PATH | O_CLOEXEC), bad;
	if (at < 0) return errno == ENOENT || errno == EACCES || errno == ENOTDIR ? 0 : -1;
	bad = allow(w, at, rights);
	close(at);
	return bad;
}

/* /dev/stdout and the like open the file again, which lies outside: as it was opened before. */
static int allow_std(const struct wall *w) {
	static const uint64_t by_mode[] = { FS_READ_FILE, FS_WRITE_FILE | FS_TRUNCATE, FS_READ_FILE | FS_WRITE_FILE | FS_TRUNCATE, 0 };
	for (int i = 0; i < 3; i++) {
		int flags = fcntl(i, F_GETFL);
		if (flags < 0 || allow(w, i, by_mode[flags & O_ACCMODE] | FS_IOCTL_DEV)) return -1;
	}
	return 0;
}

static int allow_op(const struct nw_run *r, const struct wall *w, const struct nw_op *op) {
	switch (op->kind) {
	case NW_BIND:
	case NW_SLAVE: return op->flags & NW_OP_RW ? allow_path(w, op->path, w->fs) : 0;
	case NW_TMPFS:
	case NW_DISK: return allow_path(w, op->path, w->fs);
	case NW_MQUEUE: return allow_path(w, "/dev/mqueue", w->fs);
	case NW_HOME: return r->id.account && r->id.account->home ? allow_path(w, r->id.account->home, w->fs) : 0;
	case NW_PROC: return allow_path(w, "/proc", FS_CHANGE);
	default: return 0;
	}
}

/* The root holds nothing but what the profile shows, so one rule says of all of it that it may be read; what may be written is named. */
static int allow_files(const struct nw_run *r, const struct wall *w) {
	int bad = allow_path(w, "/", FS_READ) || allow_path(w, "/dev", FS_CHANGE) || allow_std(w);
	for (int i = 0; !bad && i < r->profile.n; i++) bad = allow_op(r, w, &r->profile.op[i]);
	for (int i = 0; !bad && i < r->decision.exposes; i++) bad = allow_path(w, r->expose[i].path, w->fs);
	return bad || (r->work.path && allow_path(w, r->work.path, w->fs)) ? -1 : 0;
}

static int allow_ports(const struct wall *w, const struct nw_ports *ports, uint64_t right) {
	for (int i = 0; i < ports->n; i++)
		if (syscall(SYS_landlock_add_rule, w->fd, RULE_PORT, &(struct port_rule){ right, ports->port[i] }, 0)) return -1;
	return 0;
}

int nwp_landlock(const struct nw_run *r) {
	const struct nw_profile *p = &r->profile;
	unsigned on = p->landlock;
	struct ruleset rules = { .net = on & NW_LANDLOCK_TCP ? NET_BIND | NET_CONNECT : 0 };
	struct wall w = { -1, 0 };
	if (!on) return 0;
	if (on & NW_LANDLOCK_FILES) w.fs = (1ull << (r->landlock >= 5 ? 16 : r->landlock >= 3 ? 15 : 14)) - 1;
	rules.fs = w.fs;
	rules.scoped = (on & NW_LANDLOCK_ABSTRACT ? SCOPE_ABSTRACT : 0) | (on & NW_LANDLOCK_SIGNALS ? SCOPE_SIGNALS : 0);
	w.fd = (int)syscall(SYS_landlock_create_ruleset, &rules, sizeof rules, 0); /* fields that a kernel does not know must be 0, and are */
	bool bad = w.fd < 0 || (w.fs && allow_files(r, &w)) ||
		   (rules.net && (allow_ports(&w, &p->tcp_bind, NET_BIND) || allow_ports(&w, &p->tcp_connect, NET_CONNECT))) ||
		   syscall(SYS_landlock_restrict_self, w.fd, 0);
	nwp_close(&w.fd);
	return bad ? -1 : 0;
}

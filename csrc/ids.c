/* Identity and rights: changed once, downwards, and proved (I5). */
#include "run.h"

#define FILTER_MAX (64u << 10)

/* A filter program, or the rules of a network: both are made of pieces of 8 bytes. */
int nwp_policy_file(const struct nw_run *r, const char *name, void **data, size_t *len, struct nw_err *e) {
	char path[2 * NW_PATH];
	snprintf(path, sizeof path, "%s/%s", r->guard.policy, name);
	*data = nwp_read_trusted(path, nwp_trusted_owner(r), FILTER_MAX, len, e);
	if (!*data) return -1;
	if (*len == 0 || *len % sizeof(struct sock_filter)) {
		free(*data);
		return nw_fail(e, NW_INTERNAL, "NW-SECCOMP", "%s: not a filter program or a network's rules; run \"nodewrap policy apply\"", path);
	}
	return 0;
}

static int set_caps(uint64_t effective) {
	struct __user_cap_header_struct h = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct d[2] = { 0 };
	d[0].effective = d[0].permitted = (uint32_t)effective;
	d[1].effective = d[1].permitted = (uint32_t)(effective >> 32);
	return (int)syscall(SYS_capset, &h, d);
}

/* Nothing to be had from a file, ever again. Before the ids change: it takes CAP_SETPCAP. */
int nwp_drop_bounding(void) {
	int cap = 0;
	while (prctl(PR_CAPBSET_DROP, cap) == 0) cap++;
	if (errno != EINVAL && errno != EPERM) return -1; /* behind the last one; no CAP_SETPCAP: no_new_privs makes the set moot then */
	return prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
}

int nwp_keep_caps(uint64_t caps) {
	return set_caps(caps);
}

/* The payload's supplementary groups: its account's, and those of the caller's by which a batch system finds the processes of a job
 * (HTCondor's USE_GID_PROCESS_TRACKING, Grid Engine's gid_range). Set by init: in the payload's own user namespace they have no number, and
 * cannot be named any more, but are kept (user_namespaces(7)). */
int nwp_set_groups(const struct nw_run *r) {
	const struct nw_account *a = r->id.account;
	gid_t group[NW_GROUPS + NW_CALLER_GROUPS];
	size_t n = a ? (size_t)a->groups : 0;
	if (!r->launcher->privileged || r->decision.mode == NW_LOG_ONLY) return 0;
	if (n) memcpy(group, a->group, n * sizeof *group);
	for (int i = 0; i < r->caller.groups; i++)
		if (nw_in_ranges(&r->guard.tracking_gid, r->caller.group[i])) group[n++] = r->caller.group[i];
	return setgroups(n, group);
}

/* All three ids, then the proof: neither the old ids nor a changed file-system id may come back. */
int nwp_become(uid_t uid, gid_t gid, bool keep_groups) {
	uid_t r, e, s;
	gid_t rg, eg, sg;
	if (!keep_groups && setgroups(0, NULL)) return -1;
	if (setresgid(gid, gid, gid) || setresuid(uid, uid, uid) || set_caps(0)) return -1;
	if (getresuid(&r, &e, &s) || getresgid(&rg, &eg, &sg) || r != uid || e != uid || s != uid || rg != gid || eg != gid || sg != gid) return -1;
	if (uid != 0 && (setuid(0) == 0 || seteuid(0) == 0 || setgroups(0, NULL) == 0)) __builtin_trap(); /* ends a namespace's init too; abort(3) may not */
	return 0;
}

/* The owner's rights to files and, for what ownership needs, these capabilities alone. By the file-system ids: who has the owner's id can neither
 * stop, kill, trace nor limit this process (kill(2), ptrace(2), prlimit(2) ask for the others, which stay root's). setfsuid(2) reports nothing, so
 * the change is read back. */
int nwp_keep_chown(uid_t uid, gid_t gid, uint64_t caps) {
	if (setgroups(0, NULL)) return -1;
	setfsgid(gid);
	setfsuid(uid);
	if ((uid_t)setfsuid((uid_t)-1) != uid || (gid_t)setfsgid((gid_t)-1) != gid) return -1;
	return set_caps(caps);
}

static int run_newidmap(const char *tool, pid_t pid, uint32_t own, uint32_t inside, uint32_t first, uint32_t count) {
	char p[16], o[16], i[16], f[16], c[16];
	char *argv[] = { (char *)(uintptr_t)tool, p, (char *)"0", o, (char *)"1", i, f, c, NULL }, *env[] = { NULL };
	posix_spawn_file_actions_t quiet; /* what is wrong is told by us, in one line; when all of us are killed, by nobody */
	pid_t child;
	int status, bad;
	snprintf(p, sizeof p, "%d", (int)pid);
	snprintf(o, sizeof o, "%u", own);
	snprintf(i, sizeof i, "%u", inside);
	snprintf(f, sizeof f, "%u", first);
	snprintf(c, sizeof c, "%u", count);
	if (posix_spawn_file_actions_init(&quiet)) return -1;
	bad = posix_spawn_file_actions_addopen(&quiet, 2, "/dev/null", O_WRONLY, 0) || posix_spawn(&child, tool, &quiet, NULL, argv, env) ||
	      waitpid(child, &status, 0) != child || status;
	posix_spawn_file_actions_destroy(&quiet);
	return bad ? -1 : 0;
}

/* What is opened by number is of whoever has it now: the payload's still, as long as it has not been reaped. Init is our own child. */
static int write_map(const struct nw_run *r, pid_t pid, const char *name, const char *text) {
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0) return -1;
	bool strangers = r->payload_fd >= 0 && nwp_is_reaped(r->payload_fd);
	ssize_t n = strangers ? -1 : write(fd, text, strlen(text));
	int err = strangers ? ESRCH : errno;
	close(fd);
	errno = err;
	return n == (ssize_t)strlen(text) ? 0 : -1;
}

/* Who is who in the new user namespace of pid. Real root writes any map; an ordinary caller its own id alone, or, with its range of
 * /etc/subuid, through newuidmap(1): then 0 inside is the caller (init, who builds and hands over), the payload is in the range. */
int nwp_write_maps(struct nw_run *r, pid_t pid, struct nw_err *e) {
	struct nw_identity *id = &r->id;
	uint32_t from = id->block > 1 ? 1 : id->inside_uid, n = id->block > 1 ? id->block - 1 : 1, out = id->block > 1 ? id->first + 1 : id->first;
	char uid[64], gid[64];
	int bad;
	if (!r->launcher->privileged && id->uid != r->caller.uid) {
		bad = run_newidmap("/usr/bin/newuidmap", pid, r->caller.uid, from, out, n) ||
		      run_newidmap("/usr/bin/newgidmap", pid, r->caller.gid, from, out, n);
		return bad ? nw_fail(e, NW_INTERNAL, "NW-SUBUID", "newuidmap refused %u+%u; see /etc/subuid and /etc/subgid, \"nodewrap doctor\"",
				     out, n)
			   : 0;
	}
	snprintf(uid, sizeof uid, "%u %u %u", id->block > 1 ? 0 : id->inside_uid, id->first, id->block);
	snprintf(gid, sizeof gid, "%u %u %u", id->block > 1 ? 0 : id->inside_gid, id->block > 1 ? id->first : id->gid, id->block);
	bad = (!r->launcher->privileged && write_map(r, pid, "setgroups", "deny")) || write_map(r, pid, "uid_map", uid) ||
	      write_map(r, pid, "gid_map", gid);
	return bad ? nw_fail(e, NW_INTERNAL, "NW-USERNS", "cannot map uid %u in a user namespace: %s; see \"nodewrap doctor\"", id->uid,
			     strerror(errno))
		   : 0;
}

/* The decision against the guard (I2): a fully hostile child gets nothing that is not allowed here. */
#include <string.h>
#include <sys/resource.h>

#include "decision.h"

static int no(struct nw_err *e, const char *what) {
	return nw_fail(e, NW_INTERNAL, "NW-GUARD", "the decision leaves the guard: %s; compare the guard file with \"nodewrap policy show\"", what);
}

/* Absolute, and ".." nowhere: a mount's place is made part by part. */
static bool is_path(const char *s) {
	for (const char *p = s; p && (p = strstr(p, "/..")); p++)
		if (!p[3] || p[3] == '/') return false;
	return !s || s[0] == '/';
}

static int check_account(const struct nw_account *a, const struct nw_guard *g, uint32_t caller, struct nw_err *e) {
	if (!nw_in_ranges(&g->switch_uid, a->uid) || a->uid == caller) return no(e, "an account's uid is outside switch-uid, or the caller's own");
	if (!nw_in_ranges(&g->switch_gid, a->gid)) return no(e, "an account's gid is outside switch-gid");
	for (int i = 0; i < a->groups; i++)
		if (!nw_in_ranges(&g->switch_gid, a->group[i])) return no(e, "a supplementary group is outside switch-gid");
	if (!is_path(a->home)) return no(e, "a home is not an absolute path");
	return 0;
}

static int check_map(const struct nw_mapping *m, const struct nw_guard *g, bool privileged, struct nw_err *e) {
	if (!m || m->size == 0 || m->size > 65536) return no(e, "map wants a block of 1 to 65536 ids");
	if (m->inside_uid == 0 || m->inside_gid == 0 || m->inside_uid > 2147483647u || m->inside_gid > 2147483647u)
		return no(e, "the id inside is 0 or too large");
	if (m->size > 1 && (m->inside_uid >= m->size || m->inside_gid >= m->size)) return no(e, "the id inside is not in the block");
	if (privileged && (m->first || m->count || g->map_uid.n == 0)) return no(e, "map blocks come from map-uid, which has no line");
	if (!privileged && m->count && m->count < m->size) return no(e, "the delegated range is smaller than the block");
	return 0;
}

static int check_identity(const struct nw_decision *d, const struct nw_guard *g, bool privileged, uint32_t caller, struct nw_err *e) {
	if (d->mode != NW_SWITCH && (d->accounts || d->exclusive)) return no(e, "accounts without mode switch");
	if (d->mode != NW_MAP && d->maps) return no(e, "a map without mode map");
	if (d->mode == NW_MAP) return check_map(d->maps ? d->map : NULL, g, privileged, e);
	if (d->mode == NW_LOG_ONLY) return 0;
	if (!privileged) return no(e, "mode switch wants a privileged launcher");
	if (d->accounts == 0 || (d->accounts > 1 && !d->exclusive)) return no(e, "switch wants one account, or several to lease one of");
	for (int i = 0; i < d->accounts; i++)
		if (check_account(&d->account[i], g, caller, e)) return -1;
	return 0;
}

int nw_decision_check(
	const struct nw_decision *d, const struct nw_guard *g, bool privileged, uint32_t caller, uint64_t args, uint64_t envs, struct nw_err *e) {
	if (d->verdict != NW_PERMIT) return 0;
	if (!nw_in_names(&g->allow[d->mode], d->profile)) /* a permit has both (nw_decision_decode) */
		return no(e, "this mode with this profile is not on an \"allow\" line");
	if (check_identity(d, g, privileged, caller, e)) return -1;
	if (d->argv_from > args || (d->argv_from == args && d->files == 0)) return no(e, "no command");
	for (int i = 0; i < d->keeps; i++)
		if (d->keep[i] >= envs) return no(e, "an environment index that does not exist");
	for (int i = 0; i < d->exposes; i++)
		if (!is_path(d->expose[i])) return no(e, "an exposed path is not absolute");
	for (int i = 0; i < d->files; i++)
		if (!is_path(d->file[i].path) || d->file[i].content.len > 65536 || d->file[i].mode & ~0700u)
			return no(e, "a file to write is relative, larger than 64 KiB, or has a mode for others");
	for (int i = 0; i < d->limits; i++)
		if (d->limit[i].resource >= NW_LIMIT_END || (d->limit[i].resource >= RLIM_NLIMITS && d->limit[i].resource < NW_LIMIT_MEMORY)) return no(e, "an unknown resource limit");
	if (!is_path(d->workdir) || !is_path(d->cwd)) return no(e, "a directory is not an absolute path");
	if (d->befores && !is_path(d->before[0])) return no(e, "the program in front of the command is not an absolute path");
	if (d->umask & ~0777u || d->grace_ms > 600000 || (d->status_fd >= 0 && d->status_fd < 1))
		return no(e, "umask, grace or status descriptor out of bounds");
	return 0;
}

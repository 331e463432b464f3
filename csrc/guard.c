#include "guard.h"

#include <stdio.h>
#include <string.h>

#include "line.h"

#define LOWEST_ACCOUNT 1000    /* below are system accounts (login.defs UID_MIN); never a target */
#define HIGHEST_ID 4294967293u /* -1 means "no change" to setresuid(2), -2 is kept free as nobody's */

const char *const nw_mode_name[NW_MODES] = { "switch", "map", "log-only" };

int nw_mode_number(const char *s)
{
	for (int m = 0; m < NW_MODES; m++)
		if (strcmp(s, nw_mode_name[m]) == 0) return m;
	return -1;
}

bool nw_in_ranges(const struct nw_ranges *r, uint64_t v)
{
	for (int i = 0; i < r->n; i++)
		if (v >= r->r[i].first && v <= r->r[i].last) return true;
	return false;
}

bool nw_in_names(const struct nw_names *n, const char *name)
{
	for (int i = 0; i < n->n; i++)
		if (strcmp(n->name[i], name) == 0) return true;
	return false;
}

static int bad(struct nw_lines *l, struct nw_err *e, const char *why)
{
	return nw_fail(e, NW_INTERNAL, "NW-GUARD-SYNTAX", "line %d: %.60s: %s", l->number, l->word[0], why);
}

/* A word that may name a profile, a host, a file in a fixed directory: no way out of it. */
static int copy_name(char *to, size_t size, const char *s)
{
	if (strlen(s) >= size || s[0] == '.' || s[0] == '-') return -1;
	for (const char *p = s; *p; p++)
		if (!((*p >= 'a' && *p <= 'z') || (*p >= 'A' && *p <= 'Z') || (*p >= '0' && *p <= '9') || strchr("._-", *p))) return -1;
	snprintf(to, size, "%s", s);
	return 0;
}

/* Absolute, and without "." or ".." or empty parts, so that text and place agree. */
static int copy_path(char *to, size_t size, const char *s)
{
	if (s[0] != '/' || strlen(s) >= size) return -1;
	for (const char *p = s; *p; p++)
		if (*p == '/') {
			size_t part = strcspn(p + 1, "/");
			if ((part == 0 && s[1]) || (part == 1 && p[1] == '.') || (part == 2 && p[1] == '.' && p[2] == '.')) return -1;
		}
	snprintf(to, size, "%s", s);
	return 0;
}

static int parse_range(const char *s, struct nw_range *r)
{
	char first[16];
	const char *dash = strchr(s, '-');
	uint64_t a, b;
	if (!dash || (size_t)(dash - s) >= sizeof first) return -1;
	snprintf(first, sizeof first, "%.*s", (int)(dash - s), s);
	if (nw_number(first, HIGHEST_ID, &a) || nw_number(dash + 1, HIGHEST_ID, &b) || a > b) return -1;
	r->first = (uint32_t)a;
	r->last = (uint32_t)b;
	return 0;
}

static int parse_ranges(struct nw_lines *l, struct nw_ranges *to, uint32_t lowest, struct nw_err *e)
{
	if (to->n) return bad(l, e, "stands twice");
	if (l->words < 2 || l->words - 1 > NW_RANGES) return bad(l, e, "wants 1 to 16 ranges first-last");
	for (int i = 1; i < l->words; i++) {
		struct nw_range r;
		if (parse_range(l->word[i], &r)) return bad(l, e, "wants ranges first-last");
		if (r.first < lowest) return bad(l, e, "a range begins too low (0 is never allowed; accounts begin at 1000)");
		to->r[to->n++] = r;
	}
	return 0;
}

static int parse_allow(struct nw_lines *l, struct nw_guard *g, struct nw_err *e)
{
	int mode = l->words > 2 ? nw_mode_number(l->word[1]) : -1;
	struct nw_names *to;
	if (mode < 0 || l->words - 2 > NW_NAMES) return bad(l, e, "wants a mode (switch, map, log-only) and 1 to 16 profiles");
	to = &g->allow[mode];
	if (to->n) return bad(l, e, "stands twice for this mode");
	for (int i = 2; i < l->words; i++)
		if (copy_name(to->name[to->n++], NW_NAME, l->word[i])) return bad(l, e, "a profile's name is [A-Za-z0-9._-], at most 31");
	return 0;
}

static int parse_child(struct nw_lines *l, struct nw_guard *g, struct nw_err *e)
{
	uint64_t uid, gid;
	if (g->has_child) return bad(l, e, "stands twice");
	if (l->words != 3 || nw_number(l->word[1], HIGHEST_ID, &uid) || nw_number(l->word[2], HIGHEST_ID, &gid) || !uid || !gid)
		return bad(l, e, "wants a uid and a gid, neither of them 0");
	g->has_child = true;
	g->child_uid = (uint32_t)uid;
	g->child_gid = (uint32_t)gid;
	return 0;
}

static int parse_word(struct nw_lines *l, char *to, size_t size, int (*copy)(char *, size_t, const char *), struct nw_err *e)
{
	if (to[0]) return bad(l, e, "stands twice");
	if (l->words != 2 || copy(to, size, l->word[1])) return bad(l, e, "wants one path or name");
	return 0;
}

static int parse_limit(struct nw_lines *l, uint64_t *to, uint64_t max, struct nw_err *e)
{
	if (*to) return bad(l, e, "stands twice");
	if (l->words != 2 || nw_number(l->word[1], max, to) || *to == 0) return bad(l, e, "wants one number within its limit");
	return 0;
}

static int parse_choice(struct nw_lines *l, const char *const *choices, int *to, struct nw_err *e)
{
	if (*to) return bad(l, e, "stands twice");
	for (int i = 0; l->words == 2 && choices[i]; i++)
		if (strcmp(l->word[1], choices[i]) == 0) {
			*to = i + 1; /* 0 stays "not set" */
			return 0;
		}
	return bad(l, e, "not one of its words");
}

static const char *const LAUNCHERS[] = { "setuid", "socket", "userns", NULL };
static const char *const ON_FAILURE[] = { "deny", "run-and-flag", "run", NULL };
static const char *const YES_NO[] = { "no", "yes", NULL };

struct choices {
	int launcher, on_failure, syslog;
};

static int parse_line(struct nw_lines *l, struct nw_guard *g, struct choices *c, struct nw_err *e)
{
	const struct {
		const char *key;
		char *to;
	} path[] = {
		{ "python", g->python },
		{ "script", g->script },
		{ "policyd", g->policyd },
		{ "policy", g->policy },
		{ "state", g->state },
		{ "audit", g->audit },
		{ "ca-dir", g->ca_dir },
		{ "voms-dir", g->voms_dir },
		{ "cgroup", g->cgroup },
	};
	const struct {
		const char *key;
		struct nw_ranges *to;
		uint32_t lowest;
	} range[] = {
		{ "caller-uid", &g->caller_uid, 1 },
		{ "switch-uid", &g->switch_uid, LOWEST_ACCOUNT },
		{ "switch-gid", &g->switch_gid, LOWEST_ACCOUNT },
		{ "map-uid", &g->map_uid, LOWEST_ACCOUNT },
	};
	const char *key = l->word[0];
	for (size_t i = 0; i < sizeof path / sizeof *path; i++)
		if (strcmp(key, path[i].key) == 0) return parse_word(l, path[i].to, NW_PATH, copy_path, e);
	for (size_t i = 0; i < sizeof range / sizeof *range; i++)
		if (strcmp(key, range[i].key) == 0) return parse_ranges(l, range[i].to, range[i].lowest, e);
	if (strcmp(key, "launcher") == 0) return parse_choice(l, LAUNCHERS, &c->launcher, e);
	if (strcmp(key, "audit-on-failure") == 0) return parse_choice(l, ON_FAILURE, &c->on_failure, e);
	if (strcmp(key, "syslog") == 0) return parse_choice(l, YES_NO, &c->syslog, e);
	if (strcmp(key, "child") == 0) return parse_child(l, g, e);
	if (strcmp(key, "deadline-ms") == 0) return parse_limit(l, &g->deadline_ms, 120000, e);
	if (strcmp(key, "max-wall-s") == 0) return parse_limit(l, &g->max_wall_s, 366u * 86400, e);
	if (strcmp(key, "allow") == 0) return parse_allow(l, g, e);
	return bad(l, e, "unknown word");
}

static int complete(struct nw_guard *g, struct choices *c, struct nw_err *e)
{
	const struct {
		const char *key;
		bool there;
	} need[] = {
		{ "launcher", c->launcher },
		{ "python", g->python[0] },
		{ "script", g->script[0] },
		{ "policy", g->policy[0] },
		{ "state", g->state[0] },
		{ "audit", g->audit[0] },
		{ "caller-uid", g->caller_uid.n },
		{ "child", g->has_child || c->launcher == 3 },
	};
	for (size_t i = 0; i < sizeof need / sizeof *need; i++)
		if (!need[i].there) return nw_fail(e, NW_INTERNAL, "NW-GUARD-SYNTAX", "no line \"%s\"", need[i].key);
	snprintf(g->launcher, sizeof g->launcher, "%s", LAUNCHERS[c->launcher - 1]);
	g->audit_on_failure = c->on_failure ? c->on_failure - 1 : NW_AUDIT_DENY;
	g->syslog = c->syslog == 2;
	if (!g->deadline_ms) g->deadline_ms = 10000;
	if (!g->max_wall_s) g->max_wall_s = 7 * 86400;
	return 0;
}

static int first_line(struct nw_lines *l, const char *word, struct nw_err *e)
{
	int r = nw_lines_next(l, e);
	if (r < 0) return -1;
	if (r == 0 || l->words != 2 || strcmp(l->word[0], word) || strcmp(l->word[1], "1"))
		return nw_fail(e, NW_INTERNAL, "NW-GUARD-SYNTAX", "the first line is not \"%s 1\"", word);
	return 0;
}

int nw_guard_parse(char *text, size_t len, struct nw_guard *g, struct nw_err *e)
{
	struct choices c = { 0, 0, 0 };
	struct nw_lines l;
	int r;
	memset(g, 0, sizeof *g);
	if (len > NW_FILE_MAX) return nw_fail(e, NW_INTERNAL, "NW-GUARD-SYNTAX", "longer than %u bytes", NW_FILE_MAX);
	nw_lines_begin(&l, text, len);
	if (first_line(&l, "nodewrap-guard", e)) return -1;
	while ((r = nw_lines_next(&l, e)) > 0)
		if (parse_line(&l, g, &c, e)) return -1;
	return r < 0 ? -1 : complete(g, &c, e);
}

static int parse_namespaces(struct nw_lines *l, struct nw_profile *p, struct nw_err *e)
{
	static const char *const kind[] = { "pid", "ipc", "uts", "cgroup", "mount", "net", NULL };
	if (p->namespaces || l->words < 2) return bad(l, e, "wants kinds, once");
	for (int w = 1; w < l->words; w++) {
		int k = 0;
		while (kind[k] && strcmp(kind[k], l->word[w])) k++;
		if (!kind[k] || p->namespaces & 1u << k) return bad(l, e, "wants pid, ipc, uts, cgroup, mount, net, each once");
		p->namespaces |= 1u << k;
	}
	return 0;
}

static struct nw_op *new_op(struct nw_profile *p, int kind)
{
	struct nw_op *op = p->n < NW_OPS ? &p->op[p->n] : NULL;
	if (op) {
		p->n++;
		op->kind = kind;
	}
	return op;
}

static int parse_bind(struct nw_lines *l, struct nw_profile *p, int kind, struct nw_err *e)
{
	static const struct {
		const char *word;
		unsigned flags;
	} mode[] = {
		{ "ro", 0 },
		{ "rw", NW_OP_RW },
		{ "ro?", NW_OP_OPTIONAL },
		{ "rw?", NW_OP_RW | NW_OP_OPTIONAL },
	};
	struct nw_op *op = l->words == 3 ? new_op(p, kind) : NULL;
	if (!op || copy_path(op->path, NW_PATH, l->word[2]) || !op->path[1]) return bad(l, e, "wants a mode and an absolute path below /");
	for (size_t i = 0; i < sizeof mode / sizeof *mode; i++)
		if (strcmp(l->word[1], mode[i].word) == 0) {
			op->flags = mode[i].flags;
			return 0;
		}
	return bad(l, e, "the mode is ro, rw, ro? or rw?");
}

static int parse_link(struct nw_lines *l, struct nw_profile *p, struct nw_err *e)
{
	struct nw_op *op = l->words == 3 ? new_op(p, NW_LINK) : NULL;
	if (!op || copy_path(op->path, NW_PATH, l->word[1]) || !op->path[1] || strlen(l->word[2]) >= NW_PATH)
		return bad(l, e, "wants an absolute path and what it points to");
	snprintf(op->arg, sizeof op->arg, "%s", l->word[2]);
	return 0;
}

static int parse_tmpfs(struct nw_lines *l, struct nw_profile *p, struct nw_err *e)
{
	struct nw_op *op = l->words == 4 ? new_op(p, NW_TMPFS) : NULL;
	if (!op || copy_path(op->path, NW_PATH, l->word[1]) || !op->path[1] || nw_octal(l->word[2], &op->mode) || op->mode > 01777 ||
		nw_number(l->word[3], 1ull << 50, &op->size) || op->size < 4096)
		return bad(l, e, "wants a path, an octal mode up to 1777 and a size of 4096 bytes or more");
	return 0;
}

static int parse_dev(struct nw_lines *l, struct nw_profile *p, struct nw_err *e)
{
	if (l->words < 2) return bad(l, e, "wants names");
	for (int i = 1; i < l->words; i++) {
		struct nw_op *op = new_op(p, NW_DEV);
		if (!op || copy_name(op->path, NW_NAME, l->word[i])) return bad(l, e, "a node's name is [A-Za-z0-9._-], at most 31");
	}
	return 0;
}

static int parse_plain(struct nw_lines *l, struct nw_profile *p, int kind, struct nw_err *e)
{
	return l->words == 1 && new_op(p, kind) ? 0 : bad(l, e, "stands alone");
}

static int parse_fixed(struct nw_lines *l, bool *to, const char *yes, const char *no, struct nw_err *e)
{
	if (l->words != 2 || (strcmp(l->word[1], yes) && (!no || strcmp(l->word[1], no)))) return bad(l, e, "not one of its words");
	*to = strcmp(l->word[1], yes) == 0;
	return 0;
}

static int parse_profile_line(struct nw_lines *l, struct nw_profile *p, struct nw_err *e)
{
	const char *key = l->word[0];
	if (strcmp(key, "bind") == 0) return parse_bind(l, p, NW_BIND, e);
	if (strcmp(key, "slave") == 0) return parse_bind(l, p, NW_SLAVE, e);
	if (strcmp(key, "link") == 0) return parse_link(l, p, e);
	if (strcmp(key, "tmpfs") == 0) return parse_tmpfs(l, p, e);
	if (strcmp(key, "dev") == 0) return parse_dev(l, p, e);
	if (strcmp(key, "proc") == 0) return parse_plain(l, p, NW_PROC, e);
	if (strcmp(key, "mqueue") == 0) return parse_plain(l, p, NW_MQUEUE, e);
	if (strcmp(key, "home") == 0) return parse_plain(l, p, NW_HOME, e);
	if (strcmp(key, "namespace") == 0) return parse_namespaces(l, p, e);
	if (strcmp(key, "seccomp") == 0) return parse_word(l, p->seccomp, sizeof p->seccomp, copy_name, e);
	if (strcmp(key, "hostname") == 0) return parse_word(l, p->hostname, sizeof p->hostname, copy_name, e);
	if (strcmp(key, "landlock") == 0) return parse_fixed(l, &p->landlock_abstract, "abstract", NULL, e);
	if (strcmp(key, "on-missing") == 0) return parse_fixed(l, &p->degrade, "degrade", "refuse", e);
	return bad(l, e, "unknown word");
}

int nw_profile_parse(char *text, size_t len, const char *name, struct nw_profile *p, struct nw_err *e)
{
	struct nw_names seen = { 0 };
	static struct nw_profile other;
	struct nw_profile *now = NULL;
	struct nw_lines l;
	int r;
	memset(p, 0, sizeof *p);
	if (len > NW_FILE_MAX) return nw_fail(e, NW_INTERNAL, "NW-GUARD-SYNTAX", "longer than %u bytes", NW_FILE_MAX);
	nw_lines_begin(&l, text, len);
	if (first_line(&l, "nodewrap-profiles", e)) return -1;
	while ((r = nw_lines_next(&l, e)) > 0) {
		if (strcmp(l.word[0], "profile") == 0) {
			if (l.words != 2 || seen.n == NW_NAMES || copy_name(seen.name[seen.n], NW_NAME, l.word[1]) || nw_in_names(&seen, l.word[1]))
				return bad(&l, e, "wants one new name (at most 16 profiles)");
			now = strcmp(l.word[1], name) ? &other : p;
			memset(now, 0, sizeof *now);
			snprintf(now->name, sizeof now->name, "%s", seen.name[seen.n++]);
		} else if (!now) {
			return bad(&l, e, "stands before the first profile");
		} else if (parse_profile_line(&l, now, e)) {
			return -1;
		}
	}
	if (r == 0 && !p->name[0]) return nw_fail(e, NW_INTERNAL, "NW-PROFILE", "no profile called \"%.31s\"; see \"nodewrap policy show\"", name);
	return r < 0 ? -1 : 0;
}

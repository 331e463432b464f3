#include "guard.h"

#include <stdio.h>
#include <string.h>

#include "line.h"

#define LOWEST_ACCOUNT 1000    /* below are system accounts (login.defs UID_MIN); never a target */
#define LOWEST_TRACKING 201    /* below are groups that distributions give out by number, such as disk and shadow */
#define HIGHEST_ID 4294967292u /* -1 means "no change" to setresuid(2), -2 and -3 are kept free (nodewrap/deep/owner.py) */

const char *const nw_mode_name[NW_MODES] = { "switch", "map", "log-only" };

int nw_mode_number(const char *s) {
	for (int m = 0; m < NW_MODES; m++)
		if (strcmp(s, nw_mode_name[m]) == 0) return m;
	return -1;
}

bool nw_in_ranges(const struct nw_ranges *r, uint64_t v) {
	for (int i = 0; i < r->n; i++)
		if (v >= r->r[i].first && v <= r->r[i].last) return true;
	return false;
}

bool nw_in_names(const struct nw_names *n, const char *name) {
	for (int i = 0; i < n->n; i++)
		if (strcmp(n->name[i], name) == 0) return true;
	return false;
}

static int bad(struct nw_lines *l, struct nw_err *e, const char *why) {
	return nw_fail(e, NW_INTERNAL, "NW-GUARD-SYNTAX", "line %d: %.60s: %s", l->number, l->word[0], why);
}

/* A word that may name a profile, a host, a file in a fixed directory: no way out of it. */
static int copy_name(char *to, size_t size, const char *s) {
	if (strlen(s) >= size || s[0] == '.' || s[0] == '-') return -1;
	for (const char *p = s; *p; p++)
		if (!((*p >= 'a' && *p <= 'z') || (*p >= 'A' && *p <= 'Z') || (*p >= '0' && *p <= '9') || strchr("._-", *p))) return -1;
	snprintf(to, size, "%s", s);
	return 0;
}

/* Absolute, and without "." or ".." or empty parts, so that text and place agree. */
static int copy_path(char *to, size_t size, const char *s) {
	if (s[0] != '/' || strlen(s) >= size) return -1;
	for (const char *p = s; *p; p++)
		if (*p == '/') {
			size_t part = strcspn(p + 1, "/");
			if ((part == 0 && s[1]) || (part == 1 && p[1] == '.') || (part == 2 && p[1] == '.' && p[2] == '.')) return -1;
		}
	snprintf(to, size, "%s", s);
	return 0;
}

static int parse_range(const char *s, struct nw_range *r) {
	char first[16];
	const char *dash = strchr(s, '-');
	uint64_t a, b;
	if (!dash || (size_t)(dash - s) >= sizeof first) return -1;
	snprintf(first, sizeof first, "%.*s", (int)(dash - s), s);
	if (nw_number(first, HIGHEST_ID, &a) || nw_number(dash + 1, HIGHEST_ID, &b) || a > b) return -1;
	*r = (struct nw_range){ (uint32_t)a, (uint32_t)b };
	return 0;
}

/* One line of either file: its word, how the rest is read, and where it goes. Twice: it may repeat. */
enum kind { PATH, NAME, RANGES, LIMIT, CHOICE, CHILD, NETWORK, NETWORK6, ALLOW, NAMESPACES, BIND, LINK, TMPFS, DEV, PLAIN, PLACE, WALLS, PORTS };
struct key {
	const char *word;
	enum kind kind;
	size_t at;                  /* offset in the guard or the profile; for places their nw_op_kind */
	uint64_t bound;             /* LIMIT: highest; RANGES: lowest; NAME: room */
	const char *const *choices; /* CHOICE: an int gets the number of the word */
	bool twice;
};

static const char *const LAUNCHERS[] = { "setuid", "socket", "userns", NULL };
static const char *const ON_FAILURE[] = { "deny", "run-and-flag", "run", NULL };
static const char *const NO_YES[] = { "no", "yes", NULL },
			 *const LANDLOCK[] = { "abstract", "signals", "files", "tcp", NULL },
			 *const ROUTES[] = { "routed", "nat", NULL },
			 *const MISSING[] = { "refuse", "degrade", NULL };
static const char *const KINDS[] = { "pid", "ipc", "uts", "cgroup", "mount", "net", NULL }, *const MODES[] = { "ro", "rw", "ro?", "rw?", NULL };

#define AT(field) offsetof(struct nw_guard, field)
static const struct key GUARD[] = {
	{ "launcher", CHOICE, AT(launcher), 0, LAUNCHERS, false },
	{ "python", PATH, AT(python), 0, NULL, false },
	{ "script", PATH, AT(script), 0, NULL, false },
	{ "policy", PATH, AT(policy), 0, NULL, false },
	{ "state", PATH, AT(state), 0, NULL, false },
	{ "audit", PATH, AT(audit), 0, NULL, false },
	{ "caller-uid", RANGES, AT(caller_uid), 1, NULL, false },
	{ "child", CHILD, 0, 0, NULL, false },
	{ "policyd", PATH, AT(policyd), 0, NULL, false },
	{ "ca-dir", PATH, AT(ca_dir), 0, NULL, false },
	{ "voms-dir", PATH, AT(voms_dir), 0, NULL, false },
	{ "cgroup", PATH, AT(cgroup), 0, NULL, false },
	{ "tmp-dir", PATH, AT(tmp_dir), 0, NULL, false },
	{ "netd", PATH, AT(netd), 0, NULL, false },
	{ "network", NETWORK, 0, 0, NULL, false },
	{ "network6", NETWORK6, 0, 0, NULL, false },
	{ "switch-uid", RANGES, AT(switch_uid), LOWEST_ACCOUNT, NULL, false },
	{ "switch-gid", RANGES, AT(switch_gid), LOWEST_ACCOUNT, NULL, false },
	{ "map-uid", RANGES, AT(map_uid), LOWEST_ACCOUNT, NULL, false },
	{ "tracking-gid", RANGES, AT(tracking_gid), LOWEST_TRACKING, NULL, false },
	{ "audit-on-failure", CHOICE, AT(audit_on_failure), 0, ON_FAILURE, false },
	{ "syslog", CHOICE, AT(syslog), 0, NO_YES, false },
	{ "deadline-ms", LIMIT, AT(deadline_ms), 120000, NULL, false },
	{ "max-wall-s", LIMIT, AT(max_wall_s), 31622400, NULL, false },
	{ "allow", ALLOW, 0, 0, NULL, true },
};
#define GUARD_MUST 7 /* the first of them have to be there; child too, where it is another user */
#define GUARD_CHILD 7
#undef AT
#define AT(field) offsetof(struct nw_profile, field)
static const struct key PROFILE[] = {
	{ "namespace", NAMESPACES, 0, 0, NULL, false },
	{ "seccomp", NAME, AT(seccomp), 64, NULL, false },
	{ "network", NAME, AT(network), 64, NULL, false },
	{ "hostname", NAME, AT(hostname), 64, NULL, false },
	{ "landlock", WALLS, 0, 0, NULL, false },
	{ "tcp-bind", PORTS, AT(tcp_bind), 0, NULL, false },
	{ "tcp-connect", PORTS, AT(tcp_connect), 0, NULL, false },
	{ "on-missing", CHOICE, AT(degrade), 0, MISSING, false },
	{ "bind", BIND, NW_BIND, 0, NULL, true },
	{ "slave", BIND, NW_SLAVE, 0, NULL, true },
	{ "link", LINK, NW_LINK, 0, NULL, true },
	{ "tmpfs", TMPFS, NW_TMPFS, 0, NULL, true },
	{ "disk", PLACE, NW_DISK, 0, NULL, true },
	{ "dev", DEV, NW_DEV, 0, NULL, true },
	{ "proc", PLAIN, NW_PROC, 0, NULL, false },
	{ "mqueue", PLAIN, NW_MQUEUE, 0, NULL, false },
	{ "home", PLAIN, NW_HOME, 0, NULL, false },
	{ "accounts", PLAIN, NW_ACCOUNT_FILES, 0, NULL, false },
};
#undef AT

static int choice(const char *const *choices, const char *word) {
	for (int i = 0; choices[i]; i++)
		if (strcmp(word, choices[i]) == 0) return i;
	return -1;
}

static int ranges(struct nw_lines *l, struct nw_ranges *to, uint64_t lowest, struct nw_err *e) {
	if (l->words < 2 || l->words - 1 > NW_RANGES) return bad(l, e, "wants 1 to 16 ranges first-last");
	for (int i = 1; i < l->words; i++, to->n++)
		if (parse_range(l->word[i], &to->r[to->n]) || to->r[to->n].first < lowest)
			return bad(l, e, "wants ranges first-last, none of 0; those of payloads begin at 1000, tracking-gid at 201");
	return 0;
}

/* A.B.C.D/BITS, the host's bits zero, so that text and range agree. From /8 to /30: smaller ones hold no two payloads. */
static int network(struct nw_lines *l, struct nw_guard *g, struct nw_err *e) {
	uint64_t part[5] = { 0 };
	char *word = l->words == 2 ? l->word[1] : NULL;
	for (int i = 0; word && i < 5; i++) {
		size_t n = strcspn(word, i < 3 ? "." : "/");
		bool last = !word[n];
		word[n] = 0;
		word = last == (i == 4) && nw_number(word, i < 4 ? 255 : 30, &part[i]) == 0 ? word + n + 1 : NULL;
	}
	uint64_t address = part[0] << 24 | part[1] << 16 | part[2] << 8 | part[3], mask = (uint32_t)(~0ull << (32 - part[4]));
	if (!word || part[4] < 8 || address & ~mask) return bad(l, e, "wants the address of a network and its bits, as in 10.200.0.0/16, from /8 to /30");
	g->network = (uint32_t)address;
	g->netmask = (uint32_t)mask;
	return 0;
}

/* A prefix of global or of unique local addresses (RFC 4291, 4193), with room for an IPv4 address behind it, and how it is seen outside. */
static int network6(struct nw_lines *l, struct nw_guard *g, struct nw_err *e) {
	unsigned char *a = g->network6, rest = 0;
	char *slash = l->words == 3 ? strchr(l->word[1], '/') : NULL;
	uint64_t bits = 0;
	if (slash) *slash = 0;
	bool fits = slash && nw_number(slash + 1, 96, &bits) == 0 && bits >= 16 && nw_address6(l->word[1], a) == 0;
	for (uint64_t i = 0; fits && i < 128; i++)
		if (i >= bits) rest |= a[i / 8] & 128 >> i % 8;
	g->nat6 = fits ? choice(ROUTES, l->word[2]) : -1;
	if (g->nat6 < 0 || rest || ((a[0] & 0xe0) != 0x20 && (a[0] & 0xfe) != 0xfc))
		return bad(l, e, "wants a prefix of global or of unique local addresses, from /16 to /96, and nat or routed, as in fd12:3456:789a::/64 nat");
	g->bits6 = (int)bits;
	return 0;
}

static int child(struct nw_lines *l, struct nw_guard *g, struct nw_err *e) {
	uint64_t uid, gid;
	if (l->words != 3 || nw_number(l->word[1], HIGHEST_ID, &uid) || nw_number(l->word[2], HIGHEST_ID, &gid) || !uid || !gid)
		return bad(l, e, "wants a uid and a gid, neither of them 0");
	g->has_child = true;
	g->child_uid = (uint32_t)uid;
	g->child_gid = (uint32_t)gid;
	return 0;
}

static int allow(struct nw_lines *l, struct nw_guard *g, struct nw_err *e) {
	int mode = l->words > 2 ? nw_mode_number(l->word[1]) : -1;
	if (mode < 0 || l->words - 2 > NW_NAMES) return bad(l, e, "wants a mode (switch, map, log-only) and 1 to 16 profiles");
	struct nw_names *to = &g->allow[mode];
	if (to->n) return bad(l, e, "stands twice for this mode");
	for (int i = 2; i < l->words; i++)
		if (copy_name(to->name[to->n++], NW_NAME, l->word[i])) return bad(l, e, "a profile's name is [A-Za-z0-9._-], at most 31");
	return 0;
}

static int namespaces(struct nw_lines *l, struct nw_profile *p, struct nw_err *e) {
	for (int w = 1; w < l->words; w++) {
		int k = choice(KINDS, l->word[w]);
		if (k < 0 || p->namespaces & 1u << k) return bad(l, e, "wants pid, ipc, uts, cgroup, mount, net, each once");
		p->namespaces |= 1u << k;
	}
	return l->words > 1 ? 0 : bad(l, e, "wants kinds");
}

static int walls(struct nw_lines *l, struct nw_profile *p, struct nw_err *e) {
	for (int w = 1; w < l->words; w++) {
		size_t n = strlen(l->word[w]);
		bool optional = n && l->word[w][n - 1] == '?';
		if (optional) l->word[w][n - 1] = 0;
		int k = choice(LANDLOCK, l->word[w]);
		if (k < 0 || p->landlock & 1u << k) return bad(l, e, "wants abstract, signals, files, tcp, each once, with a ? or without");
		p->landlock |= 1u << k;
		if (optional) p->landlock_optional |= 1u << k;
	}
	return l->words > 1 ? 0 : bad(l, e, "wants kinds");
}

static int ports(struct nw_lines *l, struct nw_ports *to, struct nw_err *e) {
	uint64_t port;
	for (int w = 1; w < l->words; w++) {
		if (nw_number(l->word[w], 65535, &port)) return bad(l, e, "wants ports from 0 to 65535");
		to->port[to->n++] = (uint16_t)port; /* a line has no more words than that */
	}
	return l->words > 1 ? 0 : bad(l, e, "wants ports");
}

/* A place in the root: the op, with its path from the word given; NULL with *e when there is no room or it is no place. */
static struct nw_op *place(struct nw_lines *l, struct nw_profile *p, size_t kind, int words, int path, struct nw_err *e) {
	struct nw_op *op = &p->op[p->n];
	if (p->n < NW_OPS) memset(op, 0, sizeof *op);
	if (l->words != words || p->n == NW_OPS || (path && (copy_path(op->path, NW_PATH, l->word[path]) || !op->path[1]))) {
		bad(l, e, "wants another number of words, or a clean absolute path below /, or there are more than 160 places");
		return NULL;
	}
	op->kind = (int)kind;
	p->n++;
	return op;
}

static int bind(struct nw_lines *l, struct nw_profile *p, size_t kind, struct nw_err *e) {
	struct nw_op *op = place(l, p, kind, 3, 2, e);
	if (!op) return -1;
	int mode = choice(MODES, l->word[1]);
	if (mode < 0) return bad(l, e, "the mode is ro, rw, ro? or rw?");
	op->flags = (unsigned)mode; /* NW_OP_RW, NW_OP_OPTIONAL: in the order of MODES */
	return 0;
}

static int link(struct nw_lines *l, struct nw_profile *p, struct nw_err *e) {
	struct nw_op *op = place(l, p, NW_LINK, 3, 1, e);
	if (!op) return -1;
	if (strlen(l->word[2]) >= NW_PATH) return bad(l, e, "points to more than 255 bytes");
	snprintf(op->arg, sizeof op->arg, "%s", l->word[2]);
	return 0;
}

static int tmpfs(struct nw_lines *l, struct nw_profile *p, struct nw_err *e) {
	struct nw_op *op = place(l, p, NW_TMPFS, 4, 1, e);
	if (!op) return -1;
	bool fits =
		nw_octal(l->word[2], &op->mode) == 0 && op->mode <= 01777 && nw_number(l->word[3], 1ull << 50, &op->size) == 0 && op->size >= 4096;
	return fits ? 0 : bad(l, e, "wants a path, an octal mode up to 1777 and a size of 4096 bytes or more");
}

/* A node below /dev, perhaps in one directory there; a star at the end: all whose names begin so. "*" alone would be all of /dev. */
static int copy_device(char *to, size_t size, const char *s) {
	char dir[NW_NAME] = "", name[NW_NAME];
	size_t n = strcspn(s, "/"), at = s[n] ? n + 1 : 0, left = strlen(s + at);
	bool star = left && s[at + left - 1] == '*';
	if ((at && (!n || n >= sizeof dir)) || left >= sizeof name + star || (!at && left == star) || !left) return -1;
	snprintf(dir, sizeof dir, "%.*s", at ? (int)n : 0, s);
	snprintf(name, sizeof name, "%.*s", (int)(left - star), s + at);
	if (copy_name(to, size, dir) || copy_name(to, size, name)) return -1;
	snprintf(to, size, "%s", s);
	return 0;
}

static int dev(struct nw_lines *l, struct nw_profile *p, struct nw_err *e) {
	int words = l->words;
	for (int i = 1; i < words; i++) {
		struct nw_op *op = place(l, p, NW_DEV, words, 0, e);
		if (!op) return -1;
		if (copy_device(op->path, NW_PATH, l->word[i]))
			return bad(l, e, "a node is NAME or DIR/NAME of [A-Za-z0-9._-], at most 31 each, with a * at the end or without");
	}
	return words > 1 ? 0 : bad(l, e, "wants names");
}

static int one_word(struct nw_lines *l, const struct key *k, char *base, struct nw_err *e) {
	void *to = base + k->at;
	bool fits = l->words == 2;
	if (fits && k->kind == PATH) fits = copy_path(to, NW_PATH, l->word[1]) == 0;
	if (fits && k->kind == NAME) fits = copy_name(to, k->bound, l->word[1]) == 0;
	if (fits && k->kind == LIMIT) fits = nw_number(l->word[1], k->bound, to) == 0 && *(uint64_t *)to > 0;
	if (fits && k->kind == CHOICE) fits = (*(int *)to = choice(k->choices, l->word[1])) >= 0;
	return fits ? 0 : bad(l, e, "wants one word: a path, a name, a number within its limit, or one of its choices");
}

static int take(struct nw_lines *l, const struct key *k, void *base, struct nw_err *e) {
	switch (k->kind) {
	case RANGES: return ranges(l, (struct nw_ranges *)(void *)((char *)base + k->at), k->bound, e);
	case CHILD: return child(l, base, e);
	case NETWORK: return network(l, base, e);
	case NETWORK6: return network6(l, base, e);
	case ALLOW: return allow(l, base, e);
	case NAMESPACES: return namespaces(l, base, e);
	case WALLS: return walls(l, base, e);
	case PORTS: return ports(l, (struct nw_ports *)(void *)((char *)base + k->at), e);
	case BIND: return bind(l, base, k->at, e);
	case LINK: return link(l, base, e);
	case TMPFS: return tmpfs(l, base, e);
	case DEV: return dev(l, base, e);
	case PLACE: return place(l, base, k->at, 2, 1, e) ? 0 : -1;
	case PLAIN: return place(l, base, k->at, 1, 0, e) ? 0 : -1;
	default: return one_word(l, k, base, e);
	}
}

/* The line's key is looked up, must not stand again, and its words are taken. */
static int parse_line(struct nw_lines *l, const struct key *keys, size_t n, unsigned *seen, void *base, struct nw_err *e) {
	for (size_t i = 0; i < n; i++) {
		if (strcmp(l->word[0], keys[i].word)) continue;
		if (*seen & 1u << i && !keys[i].twice) return bad(l, e, "stands twice");
		*seen |= 1u << i;
		return take(l, &keys[i], base, e);
	}
	return bad(l, e, "unknown word");
}

static int begin(struct nw_lines *l, char *text, size_t len, const char *word, struct nw_err *e) {
	if (len > NW_FILE_MAX) return nw_fail(e, NW_INTERNAL, "NW-GUARD-SYNTAX", "longer than %u bytes", NW_FILE_MAX);
	nw_lines_begin(l, text, len);
	int r = nw_lines_next(l, e);
	if (r < 0) return -1;
	if (r == 0 || l->words != 2 || strcmp(l->word[0], word) || strcmp(l->word[1], "1"))
		return nw_fail(e, NW_INTERNAL, "NW-GUARD-SYNTAX", "the first line is not \"%s 1\"", word);
	return 0;
}

int nw_guard_parse(char *text, size_t len, struct nw_guard *g, struct nw_err *e) {
	struct nw_lines l;
	unsigned seen = 0;
	int r;
	memset(g, 0, sizeof *g);
	if (begin(&l, text, len, "nodewrap-guard", e)) return -1;
	while ((r = nw_lines_next(&l, e)) > 0)
		if (parse_line(&l, GUARD, sizeof GUARD / sizeof *GUARD, &seen, g, e)) return -1;
	if (r < 0) return -1;
	for (size_t i = 0; i <= GUARD_CHILD; i++)
		if (!(seen & 1u << i) && (i < GUARD_MUST || strcmp(LAUNCHERS[g->launcher], "userns")))
			return nw_fail(e, NW_INTERNAL, "NW-GUARD-SYNTAX", "no line \"%s\"", GUARD[i].word);
	if (!g->deadline_ms) g->deadline_ms = 10000;
	if (!g->max_wall_s) g->max_wall_s = 604800; /* a week */
	return 0;
}

const char *nw_launcher_name(const struct nw_guard *g) {
	return LAUNCHERS[g->launcher];
}

int nw_profile_parse(char *text, size_t len, const char *name, struct nw_profile *p, struct nw_err *e) {
	static struct nw_profile other; /* the ones not asked for are checked all the same */
	struct nw_names seen_names = { 0 };
	struct nw_profile *now = NULL;
	struct nw_lines l;
	unsigned seen = 0;
	int r;
	memset(p, 0, offsetof(struct nw_profile, op)); /* place() clears what it takes: pages never touched need not be copied by a fork */
	if (begin(&l, text, len, "nodewrap-profiles", e)) return -1;
	while ((r = nw_lines_next(&l, e)) > 0) {
		if (strcmp(l.word[0], "profile") == 0) {
			char *new = seen_names.name[seen_names.n < NW_NAMES ? seen_names.n : 0];
			if (l.words != 2 || seen_names.n == NW_NAMES || nw_in_names(&seen_names, l.word[1]) || copy_name(new, NW_NAME, l.word[1]))
				return bad(&l, e, "wants one new name (at most 16 profiles)");
			seen_names.n++;
			seen = 0;
			now = strcmp(new, name) ? &other : p;
			memset(now, 0, offsetof(struct nw_profile, op));
			snprintf(now->name, sizeof now->name, "%.31s", new);
		} else if (!now || parse_line(&l, PROFILE, sizeof PROFILE / sizeof *PROFILE, &seen, now, e)) {
			return now ? -1 : bad(&l, e, "stands before the first profile");
		}
	}
	if (r == 0 && !p->name[0]) return nw_fail(e, NW_INTERNAL, "NW-PROFILE", "no profile called \"%.31s\"; see \"nodewrap policy show\"", name);
	return r < 0 ? -1 : 0;
}

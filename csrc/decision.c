/* The body of a DECISION is read by tables: one row a tag, nothing else is known. */
#include "decision.h"

#include <string.h>

#include "wire.h"

enum type { VERSION, SMALL, FLAG, INT32, INT64, TEXT, BYTES, MODE, STRUCT };

struct row {
	unsigned tag; /* below 32; 0 ends a table */
	enum type type;
	size_t at;    /* offset of the value in what the table describes */
	uint64_t max; /* SMALL: highest value; TEXT: bytes */
	bool must;
	int room; /* of an array; 0: the field stands once */
	size_t size, count;
	const struct row *rows; /* STRUCT */
};

#define ONE(s, field) .at = offsetof(struct s, field)
#define MANY(s, field, n, capacity) \
	.at = offsetof(struct s, field), .room = (capacity), .size = sizeof(*((struct s *)0)->field), .count = offsetof(struct s, n)

static const struct row ACCOUNT[] = {
	{ 1, INT32, ONE(nw_account, uid), .must = true },
	{ 2, INT32, ONE(nw_account, gid), .must = true },
	{ 3, INT32, MANY(nw_account, group, groups, NW_GROUPS) },
	{ 4, TEXT, ONE(nw_account, name), .max = 255, .must = true },
	{ 5, TEXT, ONE(nw_account, home), .max = NW_PATH - 1 },
	{ 6, TEXT, MANY(nw_account, set, sets, NW_ACCOUNT_SET), .max = 4096 },
	{ 0 },
};
static const struct row MAP[] = {
	{ 1, INT32, ONE(nw_mapping, inside_uid), .must = true },
	{ 2, INT32, ONE(nw_mapping, inside_gid), .must = true },
	{ 3, INT32, ONE(nw_mapping, size), .must = true },
	{ 4, INT32, ONE(nw_mapping, first) },
	{ 5, INT32, ONE(nw_mapping, count) },
	{ 0 },
};
static const struct row LIMIT[] = {
	{ 1, INT32, ONE(nw_limit, resource), .must = true },
	{ 2, INT64, ONE(nw_limit, value), .must = true },
	{ 3, FLAG, ONE(nw_limit, must) },
	{ 0 },
};
static const struct row FILES[] = {
	{ 1, TEXT, ONE(nw_file, path), .max = 4095, .must = true },
	{ 2, BYTES, ONE(nw_file, content), .must = true },
	{ 3, INT32, ONE(nw_file, mode), .must = true },
	{ 4, FLAG, ONE(nw_file, temporary), .must = true },
	{ 0 },
};
static const struct row FACT[] = {
	{ 1, TEXT, ONE(nw_fact, key), .max = 64, .must = true },
	{ 2, TEXT, ONE(nw_fact, value), .max = 4096, .must = true },
	{ 0 },
};
static const struct row DECISION[] = {
	{ 1, VERSION, .must = true },
	{ 2, SMALL, ONE(nw_decision, verdict), .max = NW_ERROR, .must = true },
	{ 3, SMALL, ONE(nw_decision, exit), .max = 255 },
	{ 4, TEXT, ONE(nw_decision, code), .max = 31 },
	{ 5, TEXT, ONE(nw_decision, text), .max = 65536 },
	{ 6, MODE, ONE(nw_decision, mode) },
	{ 7, TEXT, ONE(nw_decision, profile), .max = NW_NAME - 1 },
	{ 8, STRUCT, MANY(nw_decision, account, accounts, NW_ACCOUNTS), .rows = ACCOUNT },
	{ 9, FLAG, ONE(nw_decision, exclusive) },
	{ 10, STRUCT, MANY(nw_decision, map, maps, 1), .rows = MAP },
	{ 11, TEXT, ONE(nw_decision, workdir), .max = 4095 },
	{ 12, TEXT, ONE(nw_decision, cwd), .max = 4095 },
	{ 13, TEXT, MANY(nw_decision, expose, exposes, NW_EXPOSE), .max = 4095 },
	{ 14, INT64, ONE(nw_decision, argv_from) },
	{ 15, FLAG, ONE(nw_decision, search) },
	{ 16, INT32, MANY(nw_decision, keep, keeps, NW_KEEP) },
	{ 17, TEXT, MANY(nw_decision, set, sets, NW_SET), .max = 131072 },
	{ 18, INT64, ONE(nw_decision, wall_ms) },
	{ 19, INT64, ONE(nw_decision, grace_ms) },
	{ 20, STRUCT, MANY(nw_decision, limit, limits, NW_LIMITS), .rows = LIMIT },
	{ 21, SMALL, ONE(nw_decision, status_fd), .max = 255 },
	{ 22, STRUCT, MANY(nw_decision, file, files, NW_FILES), .rows = FILES },
	{ 23, STRUCT, MANY(nw_decision, fact, facts, NW_FACTS), .rows = FACT },
	{ 24, INT32, ONE(nw_decision, umask) },
	{ 26, FLAG, ONE(nw_decision, alarm) },
	{ 27, TEXT, ONE(nw_decision, syslog), .max = 4096 },
	{ 28, TEXT, MANY(nw_decision, before, befores, NW_BEFORE), .max = 4095 },
	{ 29, FLAG, ONE(nw_decision, image) },
	{ 0 },
};

static int decode(char **arena, const unsigned char *body, size_t len, const struct row *rows, char *base);

static int number(const struct nw_field *f, const struct row *x, char *to) {
	uint64_t v, max = x->type == SMALL ? x->max : x->type == INT32 ? UINT32_MAX : x->type == INT64 ? UINT64_MAX : 1;
	if (nw_int(f, &v) || v > max || (x->type == VERSION && v != 1)) return -1;
	if (x->type == SMALL) *(int *)(void *)to = (int)v;
	if (x->type == FLAG) *(bool *)(void *)to = v;
	if (x->type == INT32) *(uint32_t *)(void *)to = (uint32_t)v;
	if (x->type == INT64) *(uint64_t *)(void *)to = v;
	return 0;
}

/* Strings get their NUL in the arena. A field costs 6 bytes of header, so they always fit into the body's length + 1. */
static int text(char **arena, const struct nw_field *f, size_t max, const char **to) {
	if (nw_is_string(f, max)) return -1;
	*to = memcpy(*arena, f->value, f->len);
	(*arena)[f->len] = 0;
	*arena += f->len + 1;
	return 0;
}

static int mode(const struct nw_field *f, int *to) {
	for (*to = 0; *to < NW_MODES; ++*to)
		if (f->len == strlen(nw_mode_name[*to]) && memcmp(f->value, nw_mode_name[*to], f->len) == 0) return 0;
	return -1;
}

static int take(char **arena, const struct nw_field *f, const struct row *x, char *to) {
	switch (x->type) {
	case TEXT: return text(arena, f, x->max, (const char **)(void *)to);
	case BYTES: *(struct nw_bytes *)(void *)to = (struct nw_bytes){ f->value, f->len }; return 0;
	case MODE: return mode(f, (int *)(void *)to);
	case STRUCT: return decode(arena, f->value, f->len, x->rows, to);
	default: return number(f, x, to);
	}
}

/* 0, or what went wrong: the tag of a bad field, or -1 when fields are missing or cut short. */
static int decode(char **arena, const unsigned char *body, size_t len, const struct row *rows, char *base) {
	struct nw_reader r = { body, body + len };
	struct nw_field f;
	unsigned seen = 0;
	int n;
	while ((n = nw_next(&r, &f)) > 0) {
		const struct row *x = rows;
		while (x->tag && x->tag != f.tag) x++;
		if (!x->tag || (seen & 1u << x->tag && !x->room)) return (int)f.tag ? (int)f.tag : -1;
		int *count = (int *)(void *)(base + x->count);
		if (x->room && *count == x->room) return (int)f.tag;
		char *to = base + x->at + (x->room ? (size_t)(*count)++ * x->size : 0);
		if (x->room) memset(to, 0, x->size);
		if (take(arena, &f, x, to)) return (int)f.tag;
		seen |= 1u << x->tag;
	}
	for (const struct row *x = rows; x->tag; x++)
		if (x->must && !(seen & 1u << x->tag)) return -1;
	return n;
}

static void empty(struct nw_decision *d) {
	memset(d, 0, offsetof(struct nw_decision, account)); /* pages never touched need not be copied by a fork */
	d->mode = d->status_fd = -1;
	d->umask = 077;
}

int nw_decision_decode(const unsigned char *body, size_t len, char *arena, struct nw_decision *d, struct nw_err *e) {
	bool many;
	empty(d);
	int bad = decode(&arena, body, len, DECISION, (char *)d);
	for (int i = 0; !bad && i < d->facts; i++)
		if (!nw_fact_path(d->fact[i].key, &many)) bad = 23;
	if (!bad && d->verdict == NW_PERMIT && (d->mode < 0 || !d->profile)) bad = -1;
	if (bad) empty(d); /* the error's record is made from *d too */
	if (bad < 0) return nw_fail(e, NW_INTERNAL, "NW-CHILD", "the policy child's decision is cut short; see syslog, \"nodewrap doctor\"");
	if (bad) return nw_fail(e, NW_INTERNAL, "NW-CHILD", "the policy child's decision is malformed at field %d; see syslog, \"nodewrap doctor\"", bad);
	return 0;
}

static const struct {
	const char *key, *path;
	bool many;
} FACTS[] = {
	{ "subject.dn", "nodewrap.subject.dn", false },
	{ "subject.issuer", "nodewrap.subject.issuer", false },
	{ "subject.sub", "nodewrap.subject.sub", false },
	{ "subject.vo", "nodewrap.subject.vo", false },
	{ "subject.fqan", "nodewrap.subject.fqans", true },
	{ "subject.assurance", "nodewrap.subject.assurance", false },
	{ "subject.serial", "nodewrap.subject.serial", false },
	{ "subject.expires", "nodewrap.subject.expires", false },
	{ "subject.credential", "nodewrap.subject.credential", false },
	{ "rule.name", "rule.name", false },
	{ "rule.ruleset", "rule.ruleset", false },
	{ "policy.digest", "nodewrap.policy.digest", false },
	{ "declared.subject", "nodewrap.declared.subject", false },
	{ "declared.vo", "nodewrap.declared.vo", false },
	{ "declared.fqan", "nodewrap.declared.fqans", true },
	{ "declared.job_id", "nodewrap.declared.job_id", false },
	{ "declared.id", "nodewrap.declared.id", false },
	{ "declared.image", "nodewrap.declared.image", false },
	{ "image.path", "nodewrap.image.path", false },
	{ "image.kind", "nodewrap.image.kind", false },
	{ "image.digest", "nodewrap.image.digest", false },
	{ "image.file", "nodewrap.image.file", false },
	{ "image.runtime", "nodewrap.image.runtime", false },
	{ "args.sha256", "process.args_sha256", false },
	{ "reason", "event.reason", false },
	{ "caller.name", "nodewrap.pilot.name", false },
	{ "note", "nodewrap.notes", true },
};

const char *nw_fact_path(const char *key, bool *many) {
	for (size_t i = 0; i < sizeof FACTS / sizeof *FACTS; i++)
		if (strcmp(FACTS[i].key, key) == 0) {
			*many = FACTS[i].many;
			return FACTS[i].path;
		}
	return NULL;
}

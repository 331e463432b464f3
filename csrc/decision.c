#include "decision.h"

#include <string.h>

#include "wire.h"

/* Strings of the body, each with its NUL. A field costs 6 bytes of header, so they always fit into len + 1. */
struct arena {
	char *p;
};

static const char *keep_string(struct arena *a, const struct nw_field *f) {
	char *s = a->p;
	memcpy(s, f->value, f->len);
	s[f->len] = 0;
	a->p += f->len + 1;
	return s;
}

static int as_string(struct arena *a, const struct nw_field *f, size_t max, const char **to) {
	if (*to || nw_is_string(f, max)) return -1;
	*to = keep_string(a, f);
	return 0;
}

static int as_u32(const struct nw_field *f, uint32_t *to) {
	uint64_t v;
	if (nw_int(f, &v) || v > UINT32_MAX) return -1;
	*to = (uint32_t)v;
	return 0;
}

static int as_small(const struct nw_field *f, uint64_t max, int *to) {
	uint64_t v;
	if (nw_int(f, &v) || v > max) return -1;
	*to = (int)v;
	return 0;
}

static int as_bool(const struct nw_field *f, bool *to) {
	int v = 0;
	if (as_small(f, 1, &v)) return -1;
	*to = v;
	return 0;
}

static struct nw_reader inside(const struct nw_field *f) {
	return (struct nw_reader){ f->value, f->value + f->len };
}

/* A struct's single fields stand once: seen holds the tags so far. */
static bool again(unsigned *seen, unsigned tag) {
	bool was = tag < 32 && *seen & 1u << tag;
	if (tag < 32) *seen |= 1u << tag;
	return was;
}

static int account(struct arena *a, const struct nw_field *outer, struct nw_account *to) {
	struct nw_reader r = inside(outer);
	struct nw_field f;
	unsigned seen = 0;
	int n;
	while ((n = nw_next(&r, &f)) > 0) {
		int bad;
		if (f.tag != 3 && f.tag != 6 && again(&seen, f.tag)) return -1;
		switch (f.tag) {
		case 1: bad = as_u32(&f, &to->uid); break;
		case 2: bad = as_u32(&f, &to->gid); break;
		case 3: bad = to->groups == NW_GROUPS || as_u32(&f, &to->group[to->groups++]); break;
		case 4: bad = as_string(a, &f, 255, &to->name); break;
		case 5: bad = as_string(a, &f, NW_PATH - 1, &to->home); break;
		case 6: bad = to->sets == NW_ACCOUNT_SET || as_string(a, &f, 4096, &to->set[to->sets++]); break;
		default: bad = -1;
		}
		if (bad) return -1;
	}
	return n || (seen & 0x16) != 0x16 ? -1 : 0; /* 1, 2 and 4 must stand */
}

static int mapping(const struct nw_field *outer, struct nw_mapping *to) {
	struct nw_reader r = inside(outer);
	struct nw_field f;
	uint32_t *field[] = { &to->inside_uid, &to->inside_gid, &to->size, &to->first, &to->count };
	unsigned seen = 0;
	int n;
	while ((n = nw_next(&r, &f)) > 0)
		if (f.tag < 1 || f.tag > 5 || again(&seen, f.tag) || as_u32(&f, field[f.tag - 1])) return -1;
	to->set = true;
	return n || (seen & 0x0e) != 0x0e ? -1 : 0;
}

static int limit(const struct nw_field *outer, struct nw_limit *to) {
	struct nw_reader r = inside(outer);
	struct nw_field f;
	unsigned seen = 0;
	int n;
	while ((n = nw_next(&r, &f)) > 0)
		if (again(&seen, f.tag) || (f.tag == 1 ? as_u32(&f, &to->resource) : f.tag == 2 ? nw_int(&f, &to->value) : -1)) return -1;
	return n || seen != 0x06 ? -1 : 0;
}

static int file(struct arena *a, const struct nw_field *outer, struct nw_file *to) {
	struct nw_reader r = inside(outer);
	struct nw_field f;
	unsigned seen = 0;
	int n;
	while ((n = nw_next(&r, &f)) > 0) {
		if (again(&seen, f.tag)) return -1;
		if (f.tag == 2) {
			to->content = f.value;
			to->len = f.len;
		} else if (f.tag == 1   ? as_string(a, &f, 4095, &to->path)
			   : f.tag == 3 ? as_u32(&f, &to->mode)
			   : f.tag == 4 ? as_bool(&f, &to->temporary)
					: -1) {
			return -1;
		}
	}
	return n || seen != 0x1e ? -1 : 0;
}

static int fact(struct arena *a, const struct nw_field *outer, struct nw_fact *to) {
	struct nw_reader r = inside(outer);
	struct nw_field f;
	unsigned seen = 0;
	bool many;
	int n;
	while ((n = nw_next(&r, &f)) > 0)
		if (again(&seen, f.tag) || (f.tag == 1 ? as_string(a, &f, 64, &to->key) : f.tag == 2 ? as_string(a, &f, 4096, &to->value) : -1))
			return -1;
	return n || seen != 0x06 || !nw_fact_path(to->key, &many) ? -1 : 0;
}

static int mode(const struct nw_field *f, struct nw_decision *d) {
	for (int m = 0; m < NW_MODES; m++)
		if (f->len == strlen(nw_mode_name[m]) && memcmp(f->value, nw_mode_name[m], f->len) == 0) {
			d->mode = m;
			return 0;
		}
	return -1;
}

static int take(struct arena *a, const struct nw_field *f, struct nw_decision *d) {
	int version = 0;
	switch (f->tag) {
	case 1: return as_small(f, 1, &version) || version != 1;
	case 2: return as_small(f, NW_ERROR, &d->verdict);
	case 3: return as_small(f, 255, &d->exit);
	case 4: return as_string(a, f, 31, &d->code);
	case 5: return as_string(a, f, 65536, &d->text);
	case 6: return mode(f, d);
	case 7: return as_string(a, f, NW_NAME - 1, &d->profile);
	case 8: return d->accounts == NW_ACCOUNTS || account(a, f, &d->account[d->accounts++]);
	case 9: return as_bool(f, &d->exclusive);
	case 10: return mapping(f, &d->map);
	case 11: return as_string(a, f, 4095, &d->workdir);
	case 12: return as_string(a, f, 4095, &d->cwd);
	case 13: return d->exposes == NW_EXPOSE || as_string(a, f, 4095, &d->expose[d->exposes++]);
	case 14: return nw_int(f, &d->argv_from);
	case 15: return as_bool(f, &d->search);
	case 16: return d->keeps == NW_KEEP || as_u32(f, &d->keep[d->keeps++]);
	case 17: return d->sets == NW_SET || as_string(a, f, 131072, &d->set[d->sets++]);
	case 18: return nw_int(f, &d->wall_ms);
	case 19: return nw_int(f, &d->grace_ms);
	case 20: return d->limits == NW_LIMITS || limit(f, &d->limit[d->limits++]);
	case 21: return as_small(f, 255, &d->status_fd);
	case 22: return d->files == NW_FILES || file(a, f, &d->file[d->files++]);
	case 23: return d->facts == NW_FACTS || fact(a, f, &d->fact[d->facts++]);
	case 24: return as_u32(f, &d->umask);
	case 26: return as_bool(f, &d->alarm);
	case 27: return as_string(a, f, 4096, &d->syslog);
	default: return -1;
	}
}

#define REPEATED (1u << 8 | 1u << 13 | 1u << 16 | 1u << 17 | 1u << 20 | 1u << 22 | 1u << 23)

int nw_decision_decode(const unsigned char *body, size_t len, char *arena, struct nw_decision *d, struct nw_err *e) {
	struct nw_reader r = { body, body + len };
	struct arena a = { arena };
	struct nw_field f;
	unsigned seen = 0;
	int n;
	memset(d, 0, sizeof *d);
	d->mode = -1;
	d->status_fd = -1;
	d->umask = 077;
	while ((n = nw_next(&r, &f)) > 0) {
		bool twice = again(&seen, f.tag) && !(f.tag < 32 && REPEATED & 1u << f.tag);
		if (twice || take(&a, &f, d))
			return nw_fail(e, NW_INTERNAL, "NW-CHILD",
				"the policy child's decision is malformed at field %u; see syslog, \"nodewrap doctor\"", f.tag);
	}
	if (n || (seen & 0x6) != 0x6)
		return nw_fail(e, NW_INTERNAL, "NW-CHILD", "the policy child's decision is cut short; see syslog, \"nodewrap doctor\"");
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

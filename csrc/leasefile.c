#include "leasefile.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "line.h"

const char *const nw_handover_name[NW_HANDOVERS] = { "plain", "idmap", "chown" };

enum { OPTIONAL = 1, MANY = 2, AFTER = 4 }; /* AFTER: appended behind "ready" */

#define AT(field) offsetof(struct nw_lease, field)

/* form, a letter for each word: i UUID, w word, e encoded, u and U numbers of 32 and 64 bits, p a pid (never 0), m mode, h handover */
static const struct rule {
	const char *key, *form;
	unsigned flags;
	size_t has, at[4];
} rules[] = {
	{ "run", "i", 0, 0, { AT(run) } },
	{ "boot", "i", 0, 0, { AT(boot) } },
	{ "time", "U", 0, 0, { AT(time_us) } },
	{ "launcher", "wpU", 0, 0, { AT(launcher), AT(front), AT(front_ticks) } },
	{ "pilot", "uuu", 0, 0, { AT(pilot_uid), AT(pilot_gid), AT(pilot_pid) } },
	{ "mode", "mw", 0, 0, { AT(mode), AT(profile) } },
	{ "id", "uu", 0, 0, { AT(uid), AT(gid) } },
	{ "inside", "uu", 0, 0, { AT(inside_uid), AT(inside_gid) } },
	{ "block", "uu", 0, 0, { AT(first), AT(size) } },
	{ "account", "e", OPTIONAL, AT(has_account), { AT(account) } },
	{ "lock", "u", OPTIONAL, AT(has_lock), { AT(lock) } },
	{ "cgroup", "e", OPTIONAL, AT(has_cgroup), { AT(cgroup) } },
	{ "disk", "e", OPTIONAL, AT(has_disk), { AT(disk) } },
	{ "work", "hUUU", OPTIONAL, AT(has_work), { AT(how), AT(dev), AT(ino), AT(btime) } },
	{ "handle", "ue", OPTIONAL, AT(has_handle), { AT(handle_type), AT(handle) } },
	{ "path", "e", OPTIONAL | MANY, 0, { 0 } },
	{ "file", "e", OPTIONAL | MANY, 0, { 0 } },
	{ "fact", "we", OPTIONAL | MANY, 0, { 0 } },
	{ "ready", "", 0, 0, { 0 } },
	{ "keeper", "pU", OPTIONAL | AFTER, AT(has_keeper), { AT(keeper), AT(keeper_ticks) } },
	{ "init", "pU", OPTIONAL | AFTER, AT(has_init), { AT(init), AT(init_ticks) } },
	{ "session", "u", OPTIONAL | AFTER, AT(has_session), { AT(session) } },
	{ "address", "u", OPTIONAL | AFTER, AT(has_address), { AT(address) } },
	{ "starting", "", OPTIONAL | AFTER, AT(starting), { 0 } },
};

#define RULES (sizeof rules / sizeof *rules)
#define READY (1u << 18)

static int bad(struct nw_err *e, const struct nw_lines *in, const char *what) {
	return nw_fail(e, NW_INTERNAL, "NW-LEASE", "line %d: %s", in->number, what);
}

static bool plain(unsigned char c) {
	return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c && strchr("/._-:=,@+", c));
}

static int hex(char c) {
	return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* In place; only what encode() writes is taken. */
static int decode(char *s) {
	char *to = s;
	if (s[0] == '%' && !s[1]) s++;
	for (; *s; s++) {
		if (*s != '%') {
			if (!plain((unsigned char)*s)) return -1;
			*to++ = *s;
			continue;
		}
		int high = hex(s[1]), low = high < 0 ? -1 : hex(s[2]);
		unsigned char c = (unsigned char)(high * 16 + low);
		if (low < 0 || c == 0 || plain(c)) return -1;
		*to++ = (char)c;
		s += 2;
	}
	*to = 0;
	return 0;
}

static int uuid(const char *s) {
	for (int i = 0; i < 36; i++)
		if (i == 8 || i == 13 || i == 18 || i == 23 ? s[i] != '-' : !((s[i] >= '0' && s[i] <= '9') || (s[i] >= 'a' && s[i] <= 'f'))) return -1;
	return s[36] ? -1 : 0;
}

static int handover(const char *s) {
	for (int i = 0; i < NW_HANDOVERS; i++)
		if (strcmp(s, nw_handover_name[i]) == 0) return i;
	return -1;
}

/* One word into its field. */
static int take(char form, char *word, void *field) {
	uint64_t v = 0;
	int n = form == 'm' ? nw_mode_number(word) : form == 'h' ? handover(word) : 0;
	bool number = form == 'u' || form == 'U' || form == 'p';
	if (number && nw_number(word, form == 'U' ? UINT64_MAX : form == 'p' ? INT32_MAX : UINT32_MAX, &v)) return -1;
	if (n < 0 || (form == 'p' && v == 0) || (form == 'i' && uuid(word)) || (form == 'e' && decode(word))) return -1;
	if (form == 'U') memcpy(field, &v, sizeof v);
	else if (number) memcpy(field, &(uint32_t){ (uint32_t)v }, sizeof(uint32_t));
	else if (form == 'm' || form == 'h') memcpy(field, &n, sizeof n);
	else memcpy(field, &word, sizeof word);
	return 0;
}

/* A line that may occur again. The parts of a path stand one behind the other, so that they can be joined in place. */
static int more(struct nw_lease *l, const struct nw_lines *in, char *end_of_path, int *path_line) {
	const char *key = in->word[0];
	char *last = in->word[in->words - 1];
	bool many;
	if (decode(last)) return -1;
	if (strcmp(key, "file") == 0) return l->files == NW_FILES ? -1 : (l->file[l->files++] = last, 0);
	if (strcmp(key, "fact") == 0 && (l->facts == NW_FACTS || !nw_fact_path(in->word[1], &many))) return -1;
	if (strcmp(key, "fact") == 0) return l->fact[l->facts++] = (struct nw_fact){ in->word[1], last }, 0;
	if (!*last || (l->path && *path_line + 1 != in->number)) return -1;
	*path_line = in->number;
	if (!l->path) l->path = last;
	else memmove(end_of_path, last, strlen(last) + 1);
	return 0;
}

static int line(struct nw_lease *l, const struct nw_lines *in, unsigned *seen, int *path_line, struct nw_err *e) {
	size_t i = 0;
	while (i < RULES && strcmp(rules[i].key, in->word[0])) i++;
	if (i == RULES) return bad(e, in, "an unknown word");
	const struct rule *x = &rules[i];
	if ((*seen & 1u << i && !(x->flags & MANY)) || !(*seen & READY) != !(x->flags & AFTER)) return bad(e, in, "out of place");
	*seen |= 1u << i;
	if (in->words != (int)strlen(x->form) + 1) return bad(e, in, "not the right number of words");
	for (int k = 0; x->form[k] && !(x->flags & MANY); k++)
		if (take(x->form[k], in->word[k + 1], (char *)l + x->at[k])) return bad(e, in, "a bad value");
	if (x->has) memcpy((char *)l + x->has, &(bool){ true }, sizeof(bool));
	if (!(x->flags & MANY)) return 0;
	return more(l, in, l->path ? (char *)(uintptr_t)l->path + strlen(l->path) : NULL, path_line) ? bad(e, in, "a bad value") : 0;
}

int nw_lease_parse(char *text, size_t len, struct nw_lease *l, struct nw_err *e) {
	struct nw_lines in;
	unsigned seen = 0, must = 0;
	int got, path_line = 0;
	memset(l, 0, sizeof *l);
	nw_lines_begin(&in, text, len);
	got = nw_lines_next(&in, e);
	if (got < 0) return bad(e, &in, "not a line of words");
	if (got == 0 || strcmp(in.word[0], "nodewrap-lease")) return bad(e, &in, "not a lease");
	if (in.words != 2 || strcmp(in.word[1], "2")) return bad(e, &in, "a lease of another version of nodewrap");
	while ((got = nw_lines_next(&in, e)) > 0)
		if (line(l, &in, &seen, &path_line, e)) return -1;
	if (got < 0) return bad(e, &in, "not a line of words");
	for (size_t i = 0; i < RULES; i++) must |= rules[i].flags & OPTIONAL ? 0 : 1u << i;
	return (seen & must) == must ? 0 : bad(e, &in, "not complete");
}

/* encode() below stops where another %XX might not fit. */
bool nw_lease_holds(const char *s) {
	size_t n = 0;
	for (; *s; s++) n += plain((unsigned char)*s) ? 1 : 3;
	return n + 2 <= NW_LEASE_VALUE;
}

struct out {
	char *p;
	size_t n, max;
};

static void __attribute__((format(printf, 2, 3))) put(struct out *o, const char *format, ...) {
	va_list ap;
	va_start(ap, format);
	int n = vsnprintf(o->p + o->n, o->max - o->n, format, ap);
	va_end(ap);
	o->n = n < 0 || (size_t)n >= o->max - o->n ? o->max - 1 : o->n + (size_t)n; /* full stays full: seen at the end */
}

/* As much of s as fits into one word; what is behind it. */
static const char *encode(struct out *o, const char *key, const char *s) {
	char word[NW_LEASE_VALUE + 1] = "%";
	size_t n = 0;
	for (; *s && n + 3 <= NW_LEASE_VALUE; s++) {
		if (plain((unsigned char)*s)) word[n++] = *s;
		else n += (size_t)snprintf(word + n, 4, "%%%02X", (unsigned char)*s);
	}
	put(o, "%s %.*s\n", key, n ? (int)n : 1, word);
	return s;
}

size_t nw_lease_write(const struct nw_lease *l, char *to, size_t max) {
	struct out o = { to, 0, max };
	char key[64];
	put(&o, "nodewrap-lease 2\nrun %s\nboot %s\ntime %llu\nlauncher %s %u %llu\npilot %u %u %u\nmode %s %s\n", l->run, l->boot,
		(unsigned long long)l->time_us, l->launcher, l->front, (unsigned long long)l->front_ticks, l->pilot_uid, l->pilot_gid, l->pilot_pid,
		nw_mode_name[l->mode], l->profile);
	put(&o, "id %u %u\ninside %u %u\nblock %u %u\n", l->uid, l->gid, l->inside_uid, l->inside_gid, l->first, l->size);
	if (l->has_account) encode(&o, "account", l->account);
	if (l->has_lock) put(&o, "lock %u\n", l->lock);
	if (l->has_cgroup) encode(&o, "cgroup", l->cgroup);
	if (l->has_disk) encode(&o, "disk", l->disk);
	if (l->has_work)
		put(&o, "work %s %llu %llu %llu\n", nw_handover_name[l->how], (unsigned long long)l->dev, (unsigned long long)l->ino,
			(unsigned long long)l->btime);
	snprintf(key, sizeof key, "handle %u", l->handle_type);
	if (l->has_handle) encode(&o, key, l->handle);
	for (const char *p = l->path; p && *p;) p = encode(&o, "path", p);
	for (int i = 0; i < l->files; i++) encode(&o, "file", l->file[i]);
	for (int i = 0; i < l->facts; i++) {
		snprintf(key, sizeof key, "fact %s", l->fact[i].key);
		encode(&o, key, l->fact[i].value);
	}
	put(&o, "ready\n");
	return o.n == max - 1 ? 0 : o.n;
}

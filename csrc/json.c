#include "json.h"

#include <stdio.h>
#include <string.h>

static void put(struct nw_json *j, const char *s, size_t n) {
	if (j->failed || n > j->max - j->len) {
		j->failed = true;
		return;
	}
	memcpy(j->p + j->len, s, n);
	j->len += n;
}

static void puts_(struct nw_json *j, const char *s) {
	put(j, s, strlen(s));
}

/* Length of the valid UTF-8 sequence at s (RFC 3629: no surrogates, no overlong forms), its code point in *c; 0: none. */
static int sequence(const unsigned char *s, unsigned *c) {
	int n = s[0] < 0x80 ? 1 : s[0] >= 0xc2 && s[0] < 0xe0 ? 2 : (s[0] & 0xf0) == 0xe0 ? 3 : s[0] >= 0xf0 && s[0] < 0xf5 ? 4 : 0;
	*c = n == 1 ? s[0] : n == 2 ? s[0] & 0x1fu : n == 3 ? s[0] & 0xfu : s[0] & 7u;
	for (int i = 1; i < n; i++) {
		if ((s[i] & 0xc0) != 0x80) return 0; /* also stops at the final NUL */
		*c = *c << 6 | (s[i] & 0x3fu);
	}
	if ((n == 3 && (*c < 0x800 || (*c >= 0xd800 && *c < 0xe000))) || (n == 4 && (*c < 0x10000 || *c > 0x10ffff))) return 0;
	return n;
}

/* What a terminal or a log reader would obey, or show as nothing: controls, line separators, marks of direction, characters without width. */
static bool is_active(unsigned c) {
	return c < 0x20 || (c >= 0x7f && c < 0xa0) || c == 0xad || c == 0x61c || (c >= 0x200b && c <= 0x200f) || (c >= 0x2028 && c <= 0x202e) ||
	       (c >= 0x2060 && c <= 0x2069) || c == 0xfeff;
}

void nw_plain(char *s) {
	unsigned c;
	for (int n; *s; s += n) {
		bool whole = (n = sequence((const unsigned char *)s, &c)) > 0;
		n = whole ? n : 1;
		if (!whole || is_active(c)) memset(s, '?', (size_t)n);
	}
}

/* One character as it is written, into to; returns how many bytes of s it stands for, 0 when that is one that had to be replaced. */
static int unit(const unsigned char *s, char to[8]) {
	unsigned c;
	int n = sequence(s, &c);
	memset(to, 0, 8);
	if (n == 0) snprintf(to, 8, "\xef\xbf\xbd");
	else if (c == '"' || c == '\\') to[0] = '\\', to[1] = (char)c;
	else if (is_active(c)) snprintf(to, 8, "\\u%04x", c);
	else for (int i = 0; i < n; i++) to[i] = (char)s[i];
	return n;
}

/* Nearly all of a record: bytes that are written as they are, at most so many. */
static size_t plain(const char *s, size_t most) {
	size_t n = 0;
	while (n < most && s[n] >= ' ' && s[n] <= '~' && s[n] != '"' && s[n] != '\\') n++;
	return n;
}

struct kept {
	size_t from, to; /* bytes of the string that stand in the record; bytes they take there */
	bool valid;      /* none had to be replaced */
};

/* The string between quotes, as much of it as cap bytes hold. */
static struct kept quoted(struct nw_json *j, const char *s, size_t cap) {
	struct kept k = { .valid = true };
	char as[8];
	put(j, "\"", 1);
	for (;;) {
		size_t as_is = plain(s + k.from, cap - k.to);
		put(j, s + k.from, as_is);
		k.from += as_is;
		k.to += as_is;
		if (!s[k.from]) break;
		int n = unit((const unsigned char *)s + k.from, as);
		if (k.to + strlen(as) > cap) break;
		puts_(j, as);
		k.to += strlen(as);
		k.from += n ? (size_t)n : 1;
		k.valid &= n > 0;
	}
	put(j, "\"", 1);
	return k;
}

static void base64(struct nw_json *j, const char *string, size_t left) {
	static const char digit[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
	const unsigned char *s = (const unsigned char *)string;
	put(j, "\"", 1);
	for (; left > 0; s += 3, left = left > 3 ? left - 3 : 0) {
		unsigned v = (unsigned)s[0] << 16 | (left > 1 ? (unsigned)s[1] << 8 : 0) | (left > 2 ? s[2] : 0);
		char q[4] = { digit[v >> 18], digit[v >> 12 & 63], left > 1 ? digit[v >> 6 & 63] : '=', left > 2 ? digit[v & 63] : '=' };
		put(j, q, 4);
	}
	put(j, "\"", 1);
}

static void name(struct nw_json *j, const char *s, size_t n) {
	if (!j->first) put(j, ",", 1);
	j->first = false;
	put(j, "\"", 1);
	put(j, s, n);
}

/* Length of the path of s's object, without the last name. */
static size_t parent(const char *s) {
	const char *dot = strrchr(s, '.');
	return dot ? (size_t)(dot - s) : 0;
}

static bool is_prefix(const char *open, const char *path) {
	size_t n = strlen(open);
	return n == 0 || (strncmp(open, path, n) == 0 && path[n] == '.');
}

/* Close and open objects until the innermost one is path's, then write path's last name. */
static void member(struct nw_json *j, const char *path, const char *suffix) {
	size_t want = parent(path);
	while (!is_prefix(j->open, path)) {
		j->open[parent(j->open)] = 0;
		put(j, "}", 1);
		j->first = false;
	}
	while (strlen(j->open) < want) {
		size_t from = strlen(j->open) ? strlen(j->open) + 1 : 0, n = strcspn(path + from, ".");
		name(j, path + from, n);
		put(j, "\":{", 3);
		j->first = true;
		if (from + n >= sizeof j->open) {
			j->failed = true;
			return;
		}
		memcpy(j->open, path, from + n);
		j->open[from + n] = 0;
	}
	path += want ? want + 1 : 0;
	name(j, path, strlen(path));
	puts_(j, suffix);
	put(j, "\":", 2);
}

void nw_json_begin(struct nw_json *j, char *buffer, size_t max, size_t cap) {
	memset(j, 0, sizeof *j);
	j->p = buffer;
	j->max = max;
	j->cap = cap;
	j->first = true;
	put(j, "{", 1);
}

static void integer(struct nw_json *j, const char *path, const char *suffix, int64_t v) {
	char n[24];
	member(j, path, suffix);
	snprintf(n, sizeof n, "%lld", (long long)v);
	puts_(j, n);
}

/* What the caller or the payload chose; it cannot push out what the site found. */
static bool is_claim(const char *path) {
	return strncmp(path, "process.", 8) == 0 || strncmp(path, "nodewrap.declared.", 18) == 0 || strncmp(path, "event.", 6) == 0;
}

void nw_json_string(struct nw_json *j, const char *path, const char *s) {
	if (!s) return;
	size_t cap = is_claim(path) || j->cap > NW_JSON_FLOOR ? j->cap : NW_JSON_FLOOR;
	member(j, path, "");
	struct kept k = quoted(j, s, cap);
	if (!k.valid) {
		member(j, path, "_b64");
		base64(j, s, k.from);
	}
	if (s[k.from]) integer(j, path, "_cut", (int64_t)strlen(s));
}

void nw_json_int(struct nw_json *j, const char *path, int64_t v) {
	integer(j, path, "", v);
}

void nw_json_bool(struct nw_json *j, const char *path, bool v) {
	member(j, path, "");
	puts_(j, v ? "true" : "false");
}

void nw_json_strings(struct nw_json *j, const char *path, const char *const *s, int n) {
	struct kept k = { .valid = true };
	size_t used = 0;
	bool valid = true, cut = false;
	int have = 0;
	member(j, path, "");
	put(j, "[", 1);
	while (have < n && !cut && used + 2 + (have > 0) <= j->cap) {
		if (have) put(j, ",", 1);
		used += 2 + (have > 0);
		k = quoted(j, s[have], j->cap - used);
		used += k.to;
		valid &= k.valid;
		cut = s[have++][k.from];
	}
	put(j, "]", 1);
	if (!valid) {
		member(j, path, "_b64");
		put(j, "[", 1);
		for (int i = 0; i < have; i++) {
			if (i) put(j, ",", 1);
			base64(j, s[i], i == have - 1 ? k.from : strlen(s[i]));
		}
		put(j, "]", 1);
	}
	if (cut || have < n) integer(j, path, "_cut", n);
}

size_t nw_json_end(struct nw_json *j) {
	while (j->open[0]) {
		j->open[parent(j->open)] = 0;
		put(j, "}", 1);
	}
	put(j, "}\n", 2);
	return j->failed ? 0 : j->len;
}

/* By ourselves: gmtime_r(3) reads /etc/localtime first (glibc, time/tzset.c). A year here begins in March, so that the leap day is its last, and
 * any five months have 153 days. Days are counted from 1 March of year 0, 719468 before 1970; an era is 400 years (proleptic Gregorian, ISO 8601). */
void nw_utc(char *to, size_t size, uint64_t us) {
	unsigned s = (unsigned)(us / 1000000 % 86400), days = (unsigned)(us / 1000000 / 86400) + 719468, of_era = days % 146097;
	unsigned year = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146096) / 365, of_year = of_era - (365 * year + year / 4 - year / 100);
	unsigned month = (5 * of_year + 2) / 153, day = of_year - (153 * month + 2) / 5 + 1;
	year += days / 146097 * 400 + (month >= 10); /* January and February are of the next one */
	snprintf(to, size, "%04u-%02u-%02uT%02u:%02u:%02u.%06uZ", year, (month + 2) % 12 + 1, day, s / 3600, s / 60 % 60, s % 60, (unsigned)(us % 1000000));
}

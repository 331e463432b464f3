#include "json.h"

#include <stdio.h>
#include <string.h>

static void put(struct nw_json *j, const char *s, size_t n)
{
	if (j->failed || n > j->max - j->len) {
		j->failed = true;
		return;
	}
	memcpy(j->p + j->len, s, n);
	j->len += n;
}

static void puts_(struct nw_json *j, const char *s)
{
	put(j, s, strlen(s));
}

/* Length of the valid UTF-8 sequence at s (RFC 3629: no surrogates, no overlong forms), its code point in *c; 0: none. */
static int sequence(const unsigned char *s, unsigned *c)
{
	int n = s[0] < 0x80 ? 1 : s[0] >= 0xc2 && s[0] < 0xe0 ? 2 : (s[0] & 0xf0) == 0xe0 ? 3 : s[0] >= 0xf0 && s[0] < 0xf5 ? 4 : 0;
	*c = n == 1 ? s[0] : n == 2 ? s[0] & 0x1fu : n == 3 ? s[0] & 0xfu : s[0] & 7u;
	for (int i = 1; i < n; i++) {
		if ((s[i] & 0xc0) != 0x80) return 0; /* also stops at the final NUL */
		*c = *c << 6 | (s[i] & 0x3fu);
	}
	if ((n == 3 && (*c < 0x800 || (*c >= 0xd800 && *c < 0xe000))) || (n == 4 && (*c < 0x10000 || *c > 0x10ffff))) return 0;
	return n;
}

/* What a terminal or a log reader would obey: controls, line separators, bidirectional overrides. */
static bool is_active(unsigned c)
{
	return c < 0x20 || (c >= 0x7f && c < 0xa0) || (c >= 0x2028 && c <= 0x202e) || (c >= 0x2066 && c <= 0x2069);
}

/* The string between quotes; false when a byte had to be replaced. */
static bool quoted(struct nw_json *j, const char *string)
{
	const unsigned char *s = (const unsigned char *)string;
	bool valid = true;
	put(j, "\"", 1);
	while (*s) {
		unsigned c;
		int n = sequence(s, &c);
		char esc[8];
		if (n == 0) {
			puts_(j, "\xef\xbf\xbd");
			valid = false;
			n = 1;
		} else if (c == '"' || c == '\\') {
			put(j, c == '"' ? "\\\"" : "\\\\", 2);
		} else if (is_active(c)) {
			snprintf(esc, sizeof esc, "\\u%04x", c);
			puts_(j, esc);
		} else {
			put(j, (const char *)s, (size_t)n);
		}
		s += n;
	}
	put(j, "\"", 1);
	return valid;
}

static void base64(struct nw_json *j, const char *string)
{
	static const char digit[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
	const unsigned char *s = (const unsigned char *)string;
	size_t left = strlen(string);
	put(j, "\"", 1);
	for (; left > 0; s += 3, left = left > 3 ? left - 3 : 0) {
		unsigned v = (unsigned)s[0] << 16 | (left > 1 ? (unsigned)s[1] << 8 : 0) | (left > 2 ? s[2] : 0);
		char q[4] = { digit[v >> 18], digit[v >> 12 & 63], left > 1 ? digit[v >> 6 & 63] : '=', left > 2 ? digit[v & 63] : '=' };
		put(j, q, 4);
	}
	put(j, "\"", 1);
}

static void name(struct nw_json *j, const char *s, size_t n)
{
	if (!j->first) put(j, ",", 1);
	j->first = false;
	put(j, "\"", 1);
	put(j, s, n);
}

/* Length of the path of s's object, without the last name. */
static size_t parent(const char *s)
{
	const char *dot = strrchr(s, '.');
	return dot ? (size_t)(dot - s) : 0;
}

static bool is_prefix(const char *open, const char *path)
{
	size_t n = strlen(open);
	return n == 0 || (strncmp(open, path, n) == 0 && path[n] == '.');
}

/* Close and open objects until the innermost one is path's, then write path's last name. */
static void member(struct nw_json *j, const char *path, const char *suffix)
{
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

void nw_json_begin(struct nw_json *j, char *buffer, size_t max)
{
	memset(j, 0, sizeof *j);
	j->p = buffer;
	j->max = max;
	j->first = true;
	put(j, "{", 1);
}

void nw_json_string(struct nw_json *j, const char *path, const char *s)
{
	member(j, path, "");
	if (quoted(j, s)) return;
	member(j, path, "_b64");
	base64(j, s);
}

void nw_json_int(struct nw_json *j, const char *path, int64_t v)
{
	char n[24];
	member(j, path, "");
	snprintf(n, sizeof n, "%lld", (long long)v);
	puts_(j, n);
}

void nw_json_bool(struct nw_json *j, const char *path, bool v)
{
	member(j, path, "");
	puts_(j, v ? "true" : "false");
}

void nw_json_strings(struct nw_json *j, const char *path, const char *const *s, int n)
{
	bool valid = true;
	member(j, path, "");
	put(j, "[", 1);
	for (int i = 0; i < n; i++) {
		if (i) put(j, ",", 1);
		valid &= quoted(j, s[i]);
	}
	put(j, "]", 1);
	if (valid) return;
	member(j, path, "_b64");
	put(j, "[", 1);
	for (int i = 0; i < n; i++) {
		if (i) put(j, ",", 1);
		base64(j, s[i]);
	}
	put(j, "]", 1);
}

size_t nw_json_end(struct nw_json *j)
{
	while (j->open[0]) {
		j->open[parent(j->open)] = 0;
		put(j, "}", 1);
	}
	put(j, "}\n", 2);
	return j->failed ? 0 : j->len;
}

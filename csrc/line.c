#include "line.h"

#include <arpa/inet.h>
#include <string.h>

void nw_lines_begin(struct nw_lines *l, char *text, size_t len) {
	memset(l, 0, sizeof *l);
	l->p = text;
	l->end = text + len;
}

static int split(struct nw_lines *l, char *p, char *end, struct nw_err *e) {
	l->words = 0;
	while (p < end) {
		if (*p == ' ' || *p == '\t') {
			p++;
			continue;
		}
		if (l->words == NW_LINE_WORDS)
			return nw_fail(e, NW_INTERNAL, "NW-GUARD-SYNTAX", "line %d: more than %d words", l->number, NW_LINE_WORDS);
		l->word[l->words++] = p;
		while (p < end && *p != ' ' && *p != '\t') p++;
		*p++ = 0;
	}
	return 0;
}

int nw_lines_next(struct nw_lines *l, struct nw_err *e) {
	while (l->p < l->end) {
		char *line = l->p, *nl = memchr(line, '\n', (size_t)(l->end - line));
		if (++l->number > NW_FILE_LINES) return nw_fail(e, NW_INTERNAL, "NW-GUARD-SYNTAX", "more than %d lines", NW_FILE_LINES);
		if (!nl) return nw_fail(e, NW_INTERNAL, "NW-GUARD-SYNTAX", "line %d: no newline at the end", l->number);
		if (nl - line > NW_LINE_MAX)
			return nw_fail(e, NW_INTERNAL, "NW-GUARD-SYNTAX", "line %d: longer than %d bytes", l->number, NW_LINE_MAX);
		l->p = nl + 1;
		for (char *p = line; p < nl; p++)
			if ((*p < 0x20 && *p != '\t') || *p > 0x7e)
				return nw_fail(e, NW_INTERNAL, "NW-GUARD-SYNTAX", "line %d: a byte that is not printable ASCII", l->number);
		while (line < nl && (*line == ' ' || *line == '\t')) line++;
		if (line == nl || *line == '#') continue;
		return split(l, line, nl, e) ? -1 : 1;
	}
	return 0;
}

int nw_number(const char *s, uint64_t max, uint64_t *v) {
	uint64_t n = 0;
	if (!*s || (s[0] == '0' && s[1])) return -1;
	for (; *s; s++) {
		unsigned d = (unsigned)(*s - '0');
		if (*s < '0' || *s > '9' || n > max / 10 || n * 10 > max - d) return -1;
		n = n * 10 + d;
	}
	*v = n;
	return 0;
}

int nw_octal(const char *s, uint32_t *v) {
	uint32_t n = 0;
	int digits = 0;
	for (; *s; s++, digits++) {
		if (*s < '0' || *s > '7' || digits == 4) return -1;
		n = n << 3 | (uint32_t)(*s - '0');
	}
	*v = n;
	return digits ? 0 : -1;
}

int nw_address6(const char *s, unsigned char *to) {
	return inet_pton(AF_INET6, s, to) == 1 ? 0 : -1;
}

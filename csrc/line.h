/* The lexer of guard and profiles (docs/guard.md): lines of words, no quoting. Works on a private copy, in place. */
#ifndef NW_LINE_H
#define NW_LINE_H

#include <stddef.h>
#include <stdint.h>

#include "err.h"

#define NW_LINE_WORDS 32
#define NW_LINE_MAX 1023
#define NW_FILE_LINES 1000
#define NW_FILE_MAX (256u << 10)

struct nw_lines {
	char *p, *end;
	int number; /* of the line last read, from 1 */
	int words;
	char *word[NW_LINE_WORDS];
};

/* Start on text[0..len); the text is cut into words in place and needs a spare byte behind it. */
void nw_lines_begin(struct nw_lines *l, char *text, size_t len);
/* The next line that has words: 1, 0 at the end, -1 with *e. */
int nw_lines_next(struct nw_lines *l, struct nw_err *e);
/* A decimal number without sign or leading zero, at most max: 0, else -1. */
int nw_number(const char *s, uint64_t max, uint64_t *v);
/* An octal mode of 1 to 4 digits: 0, else -1. */
int nw_octal(const char *s, uint32_t *v);
/* An address of IPv6, in 16 bytes: 0, else -1. */
int nw_address6(const char *s, unsigned char *to);

#endif

/* One record as one line: fields are (dotted path, value), fields with a common prefix stand together. docs/audit.md.
 * Twin: nodewrap/audit/record.py */
#ifndef NW_JSON_H
#define NW_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
#define NW_RECORD_MAX 65536
#define NW_JSON_FLOOR 512 /* strings that nobody but the site chose are not cut below this */

struct nw_json {
	char *p;
	size_t len, max;
	bool failed;    /* did not fit: nothing of it may be used */
	bool first;     /* no member in the innermost object yet */
	size_t cap;     /* most bytes between the quotes or brackets of a value; docs/audit.md, "The line" */
	char open[128]; /* dotted path of the objects that are open */
};

void nw_json_begin(struct nw_json *j, char *buffer, size_t max, size_t cap);
void nw_json_string(struct nw_json *j, const char *path, const char *s); /* NULL: nothing is written */
void nw_json_int(struct nw_json *j, const char *path, int64_t v);
void nw_json_bool(struct nw_json *j, const char *path, bool v);
void nw_json_strings(struct nw_json *j, const char *path, const char *const *s, int n);
/* Close everything and add the newline. The length, or 0 when it did not fit. */
size_t nw_json_end(struct nw_json *j);
/* "2026-11-20T21:00:00.000000Z" of microseconds since 1970, UTC, years up to 9999; size is 28 or more. */
void nw_utc(char *to, size_t size, uint64_t us);
/* Make s one line that terminals show and do not obey: what is a control, active (marks of direction, what has no width) or no UTF-8 becomes '?'. */
void nw_plain(char *s);
/* cffi: end */

#endif

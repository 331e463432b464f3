#include "err.h"

#include <stdarg.h>
#include <stdio.h>

int nw_fail(struct nw_err *e, int exit, const char *code, const char *fmt, ...) {
	va_list ap;
	e->exit = exit;
	snprintf(e->code, sizeof e->code, "%s", code);
	va_start(ap, fmt);
	vsnprintf(e->text, sizeof e->text, fmt, ap);
	va_end(ap);
	for (char *p = e->text; *p; p++)
		if ((unsigned char)*p < 0x20 || *p == 0x7f) *p = '?'; /* one line, whatever a path contained */
	return -1;
}

#include "err.h"

#include <stdarg.h>
#include <stdio.h>

#include "json.h"

int nw_fail(struct nw_err *e, int exit, const char *code, const char *fmt, ...) {
	va_list ap;
	e->exit = exit;
	snprintf(e->code, sizeof e->code, "%s", code);
	va_start(ap, fmt);
	vsnprintf(e->text, sizeof e->text, fmt, ap);
	va_end(ap);
	nw_plain(e->text); /* whatever a path contained */
	return -1;
}

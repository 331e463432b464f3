/* One error: the exit status the pilot gets, a stable code, one line of text. */
#ifndef NW_ERR_H
#define NW_ERR_H

/* cffi: begin */
struct nw_err {
	int exit;       /* 201 caller's mistake, 202 internal, 203 not authorised */
	char code[32];  /* NW-… */
	char text[512]; /* what, where it is set, the next step */
};
/* cffi: end */

/* Fill *e and return -1, so that a function can end with "return nw_fail(…)". */
int nw_fail(struct nw_err *e, int exit, const char *code, const char *fmt, ...) __attribute__((format(printf, 4, 5)));

#define NW_USAGE 201
#define NW_INTERNAL 202
#define NW_DENIED 203
#define NW_COLLIDES 204

#endif

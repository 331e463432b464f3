/* Frames and fields of docs/wire.md. Bounded, no allocation while reading. Twin: nodewrap/wire.py */
#ifndef NW_WIRE_H
#define NW_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum nw_frame { NW_HELLO = 1, NW_REQUEST, NW_OPEN, NW_OPENED, NW_DECISION };

#define NW_FRAME_HEADER 8
#define NW_FIELD_HEADER 6
#define NW_REQUEST_MAX (8u << 20)
#define NW_DECISION_MAX (1u << 20)
#define NW_OPEN_MAX 8192u
#define NW_SMALL_MAX 4096u

/* A buffer that grows to max; once it could not, failed stays set and further puts do nothing. */
struct nw_buf {
	unsigned char *data;
	size_t len, cap, max;
	bool failed;
};

/* cffi: begin */
struct nw_field {
	unsigned tag;
	const unsigned char *value;
	size_t len;
};

struct nw_reader {
	const unsigned char *p, *end;
};

/* The next field: 1, 0 at the end, -1 when what is left is not a field. */
int nw_next(struct nw_reader *r, struct nw_field *f);
/* The value as an integer: 0, or -1 when it is not 8 bytes. */
int nw_int(const struct nw_field *f, uint64_t *v);
/* 0 when the value has no NUL and at most max bytes, else -1. */
int nw_is_string(const struct nw_field *f, size_t max);
/* Length and type of a frame from its 8 bytes of header. */
void nw_frame_header(const unsigned char *h, uint32_t *len, uint32_t *type);
/* cffi: end */

void nw_put_bytes(struct nw_buf *b, unsigned tag, const void *value, size_t len);
void nw_put_string(struct nw_buf *b, unsigned tag, const char *s);
void nw_put_int(struct nw_buf *b, unsigned tag, uint64_t v);
/* Room for the header, filled in by nw_frame_end. */
void nw_frame_begin(struct nw_buf *b, size_t max);
int nw_frame_end(struct nw_buf *b, enum nw_frame type);
void nw_buf_free(struct nw_buf *b);

#endif

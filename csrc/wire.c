#include "wire.h"

#include <stdlib.h>
#include <string.h>

static uint64_t get_le(const unsigned char *p, int bytes) {
	uint64_t v = 0;
	for (int i = bytes - 1; i >= 0; i--) v = v << 8 | p[i];
	return v;
}

static void set_le(unsigned char *p, uint64_t v, int bytes) {
	for (int i = 0; i < bytes; i++, v >>= 8) p[i] = (unsigned char)v;
}

int nw_next(struct nw_reader *r, struct nw_field *f) {
	size_t left = (size_t)(r->end - r->p), len;
	if (left == 0) return 0;
	if (left < NW_FIELD_HEADER) return -1;
	len = (size_t)get_le(r->p + 2, 4);
	if (len > left - NW_FIELD_HEADER) return -1;
	f->tag = (unsigned)get_le(r->p, 2);
	f->value = r->p + NW_FIELD_HEADER;
	f->len = len;
	r->p += NW_FIELD_HEADER + len;
	return 1;
}

int nw_int(const struct nw_field *f, uint64_t *v) {
	if (f->len != 8) return -1;
	*v = get_le(f->value, 8);
	return 0;
}

int nw_is_string(const struct nw_field *f, size_t max) {
	return f->len > max || memchr(f->value, 0, f->len) ? -1 : 0;
}

void nw_frame_header(const unsigned char *h, uint32_t *len, uint32_t *type) {
	*len = (uint32_t)get_le(h, 4);
	*type = (uint32_t)get_le(h + 4, 4);
}

static unsigned char *grow(struct nw_buf *b, size_t more) {
	size_t cap = b->cap ? b->cap : 4096;
	unsigned char *data;
	if (b->failed || more > b->max - b->len) {
		b->failed = true;
		return NULL;
	}
	while (cap < b->len + more) cap *= 2;
	if (cap != b->cap) {
		data = realloc(b->data, cap);
		if (!data) {
			b->failed = true;
			return NULL;
		}
		b->data = data;
		b->cap = cap;
	}
	b->len += more;
	return b->data + b->len - more;
}

void nw_put_bytes(struct nw_buf *b, unsigned tag, const void *value, size_t len) {
	unsigned char *p = grow(b, NW_FIELD_HEADER + len);
	if (!p) return;
	set_le(p, tag, 2);
	set_le(p + 2, len, 4);
	if (len) memcpy(p + NW_FIELD_HEADER, value, len);
}

void nw_put_string(struct nw_buf *b, unsigned tag, const char *s) {
	nw_put_bytes(b, tag, s, strlen(s));
}

void nw_put_int(struct nw_buf *b, unsigned tag, uint64_t v) {
	unsigned char le[8];
	set_le(le, v, 8);
	nw_put_bytes(b, tag, le, sizeof le);
}

void nw_frame_begin(struct nw_buf *b, size_t max) {
	memset(b, 0, sizeof *b);
	b->max = max + NW_FRAME_HEADER;
	grow(b, NW_FRAME_HEADER);
}

int nw_frame_end(struct nw_buf *b, enum nw_frame type) {
	if (b->failed) return -1;
	set_le(b->data, b->len - NW_FRAME_HEADER, 4);
	set_le(b->data + 4, type, 4);
	return 0;
}

void nw_buf_free(struct nw_buf *b) {
	free(b->data);
	memset(b, 0, sizeof *b);
}

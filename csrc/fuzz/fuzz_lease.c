/* A lease that is taken is one that its writer could have written: written again, it reads the same. */
#include <stdlib.h>
#include <string.h>

#include "../leasefile.h"

static char *copy(const uint8_t *data, size_t size) {
	char *text = malloc(size + 1);
	if (!text) abort();
	if (size) memcpy(text, data, size);
	text[size] = 0;
	return text;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
	static struct nw_lease l, again;
	static char text[4 * NW_LEASE_MAX], second[4 * NW_LEASE_MAX];
	struct nw_err e = { 0 };
	char *first = copy(data, size);
	if (nw_lease_parse(first, size, &l, &e) == 0) {
		size_t n = nw_lease_write(&l, text, sizeof text);
		if (n == 0) abort();
		memcpy(second, text, n + 1);
		if (nw_lease_parse(second, n, &again, &e)) abort();
		if (again.uid != l.uid || again.facts != l.facts || again.files != l.files || again.how != l.how || strcmp(again.run, l.run)) abort();
		if ((l.path != NULL) != (again.path != NULL) || (l.path && strcmp(l.path, again.path))) abort();
	} else if (e.exit != NW_INTERNAL || strcmp(e.code, "NW-LEASE") || !e.text[0]) abort();
	free(first);
	return 0;
}

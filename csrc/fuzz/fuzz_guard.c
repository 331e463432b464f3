/* Guard and profiles: any bytes are parsed or refused, and what is accepted keeps the bounds that the launcher relies on. */
#include <stdlib.h>
#include <string.h>

#include "guard.h"

static char *copy(const uint8_t *data, size_t size) {
	char *text = malloc(size + 1);          /* the parsers cut in place and need the spare byte, no more */

	if (!text) abort();
	memcpy(text, data, size);
	return text;
}

static void check_ranges(const struct nw_ranges *r, uint32_t lowest) {
	if (r->n < 0 || r->n > NW_RANGES) abort();
	for (int i = 0; i < r->n; i++)
		if (r->r[i].first > r->r[i].last || r->r[i].first < lowest) abort();
}

static void check_guard(const struct nw_guard *g) {
	check_ranges(&g->caller_uid, 1);
	check_ranges(&g->switch_uid, 1000);
	check_ranges(&g->switch_gid, 1000);
	check_ranges(&g->map_uid, 1000);
	check_ranges(&g->tracking_gid, 201);
	if (g->python[0] != '/' || g->script[0] != '/' || g->state[0] != '/' || g->audit[0] != '/' || g->caller_uid.n == 0) abort();
	if (g->has_child && (!g->child_uid || !g->child_gid)) abort();
	if (g->network & ~g->netmask || (g->netmask && (~g->netmask & (~g->netmask + 1)))) abort(); /* a whole network, or none */
	if (g->bits6 && (g->bits6 < 16 || g->bits6 > 96 || g->nat6 < 0 || g->nat6 > 1 || g->network6[12] | g->network6[13] | g->network6[14] | g->network6[15]))
		abort(); /* where the IPv4 address goes */
	if (!g->deadline_ms || g->deadline_ms > 120000 || !g->max_wall_s) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
	static struct nw_guard g;
	static struct nw_profile p;
	struct nw_err e = { 0 };
	char *text = copy(data, size);

	memset(&g, 0, sizeof g);
	if (nw_guard_parse(text, size, &g, &e) == 0)
		check_guard(&g);
	else if (e.exit != NW_INTERNAL || strncmp(e.code, "NW-", 3) || !e.text[0]) abort();
	free(text);

	text = copy(data, size);
	memset(&p, 0, sizeof p);
	if (nw_profile_parse(text, size, "strict", &p, &e) == 0 && (p.n < 0 || p.n > NW_OPS || strcmp(p.name, "strict"))) abort();
	free(text);
	return 0;
}

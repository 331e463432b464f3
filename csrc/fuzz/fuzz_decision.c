/* A hostile policy child: any bytes are decoded or refused, and a permit that passes the check lies within the guard (I2). */
#include <stdlib.h>
#include <string.h>

#include "decision.h"

static const struct nw_guard GUARD = {
	.max_wall_s = 3600,
	.caller_uid = { 1, { { 2000, 2000 } } },
	.switch_uid = { 1, { { 3000, 3999 } } },
	.switch_gid = { 1, { { 3000, 3999 } } },
	.map_uid = { 1, { { 100000, 165535 } } },
	.allow = { [NW_SWITCH] = { 1, { "strict" } }, [NW_MAP] = { 1, { "batch" } } },
};

static void within(const struct nw_decision *d)
{
	if (d->mode == NW_LOG_ONLY || !nw_in_names(&GUARD.allow[d->mode], d->profile))
		abort();
	for (int i = 0; i < d->accounts; i++) {
		if (!nw_in_ranges(&GUARD.switch_uid, d->account[i].uid) || !nw_in_ranges(&GUARD.switch_gid, d->account[i].gid))
			abort();
		for (int k = 0; k < d->account[i].groups; k++)
			if (!nw_in_ranges(&GUARD.switch_gid, d->account[i].group[k]))
				abort();
	}
	if (d->wall_ms > GUARD.max_wall_s * 1000 || d->argv_from >= 4)
		abort();
	for (int i = 0; i < d->keeps; i++)
		if (d->keep[i] >= 8)
			abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct nw_decision *d = calloc(1, sizeof *d);
	char *arena = malloc(size + 1);
	struct nw_err e = { 0 };

	if (!d || !arena)
		abort();
	if (nw_decision_decode(data, size, arena, d, &e) == 0) {
		if (d->verdict == NW_PERMIT && nw_decision_check(d, &GUARD, true, 2000, 4, 8, &e) == 0)
			within(d);
	} else if (e.exit != NW_INTERNAL || strcmp(e.code, "NW-CHILD")) {
		abort();
	}
	free(arena);
	free(d);
	return 0;
}

/* A hostile policy child: any bytes are decoded or refused, and a permit that passes the check lies within the guard (I2). */
#include <stdlib.h>
#include <string.h>

#include "decision.h"

static const struct nw_guard GUARD = {
	.caller_uid = { 1, { { 2000, 2000 } } },
	.switch_uid = { 1, { { 3000, 3999 } } },
	.switch_gid = { 1, { { 3000, 3999 } } },
	.map_uid = { 1, { { 100000, 165535 } } },
	.allow = { [NW_SWITCH] = { 1, { "strict" } }, [NW_MAP] = { 1, { "batch" } } },
};

static void must(bool holds) {
	if (!holds) abort();
}

static void within(const struct nw_decision *d) {
	must(d->mode != NW_LOG_ONLY && nw_in_names(&GUARD.allow[d->mode], d->profile) && d->argv_from <= 4 && d->status_fd != 0);
	must(d->mode != NW_MAP || (d->maps == 1 && !d->accounts && d->map->inside_uid && d->map->inside_uid < 1u << 31 && d->map->size <= 65536));
	for (int i = 0; i < d->accounts; i++) {
		must(nw_in_ranges(&GUARD.switch_uid, d->account[i].uid) && nw_in_ranges(&GUARD.switch_gid, d->account[i].gid) && d->account[i].name);
		for (int k = 0; k < d->account[i].groups; k++) must(nw_in_ranges(&GUARD.switch_gid, d->account[i].group[k]));
	}
	for (int i = 0; i < d->keeps; i++) must(d->keep[i] < 8);
	must(!d->befores || d->before[0][0] == '/');
	must(!d->workdir || (d->workdir[0] == '/' && !strstr(d->workdir, "/../")));
}

/* What the launcher reads of any decision for its records. */
static size_t read_all(const struct nw_decision *d) {
	size_t n = (d->code ? strlen(d->code) : 0) + (d->text ? strlen(d->text) : 0);
	for (int i = 0; i < d->facts; i++) n += strlen(d->fact[i].key) + strlen(d->fact[i].value);
	for (int i = 0; i < d->sets; i++) n += strlen(d->set[i]);
	for (int i = 0; i < d->befores; i++) n += strlen(d->before[i]);
	for (int i = 0; i < d->files; i++) n += strlen(d->file[i].path) + (d->file[i].content.len ? d->file[i].content.p[0] : 0);
	return n;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
	static struct nw_decision d; /* what the last input left is what this one must not show */
	char *arena = malloc(size + 1);
	struct nw_err e = { 0 };
	must(arena);
	int bad = nw_decision_decode(data, size, arena, &d, &e);
	must(!bad || (e.exit == NW_INTERNAL && strcmp(e.code, "NW-CHILD") == 0 && d.verdict != NW_PERMIT));
	must(read_all(&d) <= 2 * size);
	if (d.verdict == NW_PERMIT && nw_decision_check(&d, &GUARD, true, 2000, 4, 8, &e) == 0) within(&d);
	free(arena);
	return 0;
}

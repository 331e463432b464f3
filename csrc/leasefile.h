/* The text of a lease (docs/lease.md), written and parsed. Twin: nodewrap/lease.py */
#ifndef NW_LEASEFILE_H
#define NW_LEASEFILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "decision.h"
#include "err.h"

/* cffi: begin */
#define NW_LEASE_MAX 262144
#define NW_LEASE_VALUE 900 /* encoded bytes of a word at most */

enum nw_handover { NW_PLAIN, NW_IDMAP, NW_CHOWN, NW_HANDOVERS };

struct nw_lease {
	const char *run, *boot, *launcher, *profile, *account, *cgroup, *disk, *handle, *path;
	bool has_account, has_lock, has_cgroup, has_disk, has_work, has_handle, has_keeper, has_init, has_session, has_address, starting; /* not first: offset 0 is none */
	uint64_t time_us, front_ticks, keeper_ticks, init_ticks, dev, ino, btime;
	uint32_t front, keeper, init, pilot_uid, pilot_gid, pilot_pid, uid, gid, inside_uid, inside_gid, first, size, lock, session, address, handle_type;
	int mode, how, files, facts;
	const char *file[NW_FILES];
	struct nw_fact fact[NW_FACTS];
};

/* text is cut up in place and needs one spare byte behind len; *l points into it. 0, or -1 with *e (NW-LEASE). */
int nw_lease_parse(char *text, size_t len, struct nw_lease *l, struct nw_err *e);
/* Up to "ready". The length, or 0 when it did not fit. */
size_t nw_lease_write(const struct nw_lease *l, char *to, size_t max);
/* Does s fit into one word? Else it is cut, which a path of several words, and a fact, survive. */
bool nw_lease_holds(const char *s);
/* cffi: end */

extern const char *const nw_handover_name[NW_HANDOVERS];

#endif

/* What the policy child proposes, decoded (docs/wire.md, DECISION) and checked against the guard. Twin: nodewrap/wire.py */
#ifndef NW_DECISION_H
#define NW_DECISION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "err.h"
#include "guard.h"

/* cffi: begin */
#define NW_ACCOUNTS 512
#define NW_GROUPS 32
#define NW_ACCOUNT_SET 4
#define NW_KEEP 4096
#define NW_SET 512
#define NW_EXPOSE 16
#define NW_LIMITS 20
#define NW_FILES 4
#define NW_FACTS 160
#define NW_BEFORE 128

enum nw_verdict { NW_SAY, NW_PERMIT, NW_DENY, NW_MISTAKE, NW_ERROR };

struct nw_account {
	uint32_t uid, gid, group[NW_GROUPS];
	int groups;
	const char *name, *home;
	const char *set[NW_ACCOUNT_SET]; /* of the environment, when this account is the one */
	int sets;
};
struct nw_mapping {
	uint32_t inside_uid, inside_gid, size, first, count;
};
/* A limit's resource: RLIMIT_* up to 15, and these, of the run as a whole. In bytes, processes, microseconds of CPU in 100 ms, weights to 10,000. */
enum nw_limit_kind {
	NW_LIMIT_MEMORY = 32,
	NW_LIMIT_SWAP,
	NW_LIMIT_PIDS,
	NW_LIMIT_CPUS,
	NW_LIMIT_CPU_WEIGHT,
	NW_LIMIT_IO_WEIGHT,
	NW_LIMIT_SCRATCH,
	NW_LIMIT_IO_READ, /* these four of each disk, in bytes and operations a second */
	NW_LIMIT_IO_WRITE,
	NW_LIMIT_IO_READ_OPS,
	NW_LIMIT_IO_WRITE_OPS,
	NW_LIMIT_END
};
struct nw_limit {
	uint32_t resource;
	uint64_t value;
	bool must; /* where the node cannot hold it: no run */
};
struct nw_bytes {
	const unsigned char *p;
	size_t len;
};
struct nw_file {
	const char *path;
	struct nw_bytes content;
	uint32_t mode;
	bool temporary; /* removed after the run, where the payload's view is the host's */
};
struct nw_fact {
	const char *key, *value;
};

struct nw_decision {
	int verdict, exit, mode, status_fd;
	bool exclusive, search, alarm, image; /* image: what was opened as such is to be shown */
	uint32_t umask;
	const char *code, *text, *profile, *workdir, *cwd, *syslog;
	uint64_t argv_from, wall_ms, grace_ms;
	int accounts, maps, exposes, keeps, sets, limits, files, facts, befores;
	struct nw_account account[NW_ACCOUNTS]; /* from here on: as many as are used are cleared and filled */
	struct nw_mapping map[1];
	const char *expose[NW_EXPOSE], *set[NW_SET];
	uint32_t keep[NW_KEEP];
	struct nw_limit limit[NW_LIMITS];
	struct nw_file file[NW_FILES];
	struct nw_fact fact[NW_FACTS];
	const char *before[NW_BEFORE]; /* words in front of the payload's argv */
};

/* Decode body[0..len) into *d; strings are copied into arena, which must hold len + 1 bytes. 0, or -1 with *e (NW-CHILD). */
int nw_decision_decode(const unsigned char *body, size_t len, char *arena, struct nw_decision *d, struct nw_err *e);
/* May this caller be given this? As if the child were hostile (I2). 0, or -1 with *e (NW-GUARD). */
int nw_decision_check(
	const struct nw_decision *d, const struct nw_guard *g, bool privileged, uint32_t caller, uint64_t args, uint64_t envs, struct nw_err *e);
/* The place of a child's audit field in a record, or NULL when it may not set it. *many: it is a list. */
const char *nw_fact_path(const char *key, bool *many);
/* cffi: end */

#endif

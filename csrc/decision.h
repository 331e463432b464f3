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
#define NW_LIMITS 16
#define NW_FILES 4
#define NW_FACTS 160

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
struct nw_limit {
	uint32_t resource;
	uint64_t value;
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
	int verdict, exit, mode;
	bool exclusive, search, alarm;
	const char *code, *text, *profile, *workdir, *cwd, *syslog;
	struct nw_account account[NW_ACCOUNTS];
	int accounts;
	struct nw_mapping map[1];
	int maps;
	const char *expose[NW_EXPOSE];
	int exposes;
	uint64_t argv_from;
	uint32_t keep[NW_KEEP];
	int keeps;
	const char *set[NW_SET];
	int sets;
	uint64_t wall_ms, grace_ms;
	struct nw_limit limit[NW_LIMITS];
	int limits;
	int status_fd;
	struct nw_file file[NW_FILES];
	int files;
	struct nw_fact fact[NW_FACTS];
	int facts;
	uint32_t umask;
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

/* The guard (bounds on every decision) and the profiles: docs/guard.md. Twin: nodewrap/guard.py */
#ifndef NW_GUARD_H
#define NW_GUARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "err.h"

/* cffi: begin */
#define NW_PATH 256
#define NW_RANGES 16
#define NW_NAMES 16
#define NW_NAME 32
#define NW_OPS 160
#define NW_PORTS 31 /* words of a line, but the first */

enum nw_mode { NW_SWITCH, NW_MAP, NW_LOG_ONLY, NW_MODES };
enum nw_on_failure { NW_AUDIT_DENY, NW_AUDIT_FLAG, NW_AUDIT_RUN };

struct nw_range {
	uint32_t first, last;
};
struct nw_ranges {
	int n;
	struct nw_range r[NW_RANGES];
};
struct nw_names {
	int n;
	char name[NW_NAMES][NW_NAME];
};

struct nw_guard {
	int launcher; /* nw_launcher_name() */
	char python[NW_PATH], script[NW_PATH], policyd[NW_PATH], policy[NW_PATH], state[NW_PATH];
	char audit[NW_PATH], ca_dir[NW_PATH], voms_dir[NW_PATH], cgroup[NW_PATH], tmp_dir[NW_PATH], netd[NW_PATH];
	bool has_child;
	uint32_t child_uid, child_gid;
	int audit_on_failure;
	int syslog;
	uint64_t deadline_ms, max_wall_s;
	uint32_t network, netmask; /* of payloads' private addresses, in the host's byte order; netmask 0: there are none */
	unsigned char network6[16]; /* theirs of IPv6: this prefix, and the IPv4 address in the last four bytes */
	int bits6, nat6;            /* of the prefix, 0: no IPv6; behind the node's address */
	struct nw_ranges caller_uid, switch_uid, switch_gid, map_uid, tracking_gid;
	struct nw_names allow[NW_MODES]; /* profiles per mode; n 0: the mode is off */
};

enum nw_namespace { NW_NS_PID = 1, NW_NS_IPC = 2, NW_NS_UTS = 4, NW_NS_CGROUP = 8, NW_NS_MOUNT = 16, NW_NS_NET = 32 };
enum nw_op_kind { NW_BIND, NW_SLAVE, NW_LINK, NW_TMPFS, NW_DEV, NW_PROC, NW_MQUEUE, NW_HOME, NW_ACCOUNT_FILES, NW_DISK };
enum nw_op_flag { NW_OP_RW = 1, NW_OP_OPTIONAL = 2 };

enum nw_landlock { NW_LANDLOCK_ABSTRACT = 1, NW_LANDLOCK_SIGNALS = 2, NW_LANDLOCK_FILES = 4, NW_LANDLOCK_TCP = 8 };

struct nw_ports {
	int n;
	uint16_t port[NW_PORTS];
};

struct nw_op {
	int kind;
	unsigned flags;
	char path[NW_PATH]; /* where it appears; for NW_DEV the node below /dev, or with * all that begin so */
	char arg[NW_PATH];  /* NW_LINK: what it points to */
	uint32_t mode;
	uint64_t size;
};

struct nw_profile {
	char name[NW_NAME];
	unsigned namespaces;
	char seccomp[NW_NAME * 2], network[NW_NAME * 2];
	char hostname[NW_NAME * 2];
	unsigned landlock, landlock_optional; /* optional: recorded, never refused, where the kernel lacks it */
	struct nw_ports tcp_bind, tcp_connect;
	int degrade;
	int n;
	struct nw_op op[NW_OPS];
};

/* text is cut up in place and needs one spare byte behind len. 0, or -1 with *e. */
int nw_guard_parse(char *text, size_t len, struct nw_guard *g, struct nw_err *e);
/* Checks the whole file; *p is the profile called name. No such profile: -1, NW-PROFILE. */
int nw_profile_parse(char *text, size_t len, const char *name, struct nw_profile *p, struct nw_err *e);
int nw_mode_number(const char *s);
const char *nw_launcher_name(const struct nw_guard *g);
bool nw_in_ranges(const struct nw_ranges *r, uint64_t v);
bool nw_in_names(const struct nw_names *n, const char *name);
/* cffi: end */

extern const char *const nw_mode_name[NW_MODES];

#endif

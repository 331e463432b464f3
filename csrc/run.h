/* One run, from the caller's exec to the exit code. nwp_* may hold privilege; order of the steps: nwp_main() in run.c. */
#ifndef NW_RUN_H
#define NW_RUN_H

#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/close_range.h>
#include <linux/filter.h>
#include <linux/keyctl.h>
#include <linux/landlock.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <linux/sched.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/fsuid.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/types.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#include "calls.h"
#include "decision.h"
#include "err.h"
#include "guard.h"
#include "json.h"
#include "leasefile.h"
#include "lock.h"
#include "wire.h"

struct nw_launcher {
	const char *name;
	bool privileged; /* real root in the initial user namespace */
};

#define NW_CALLER_GROUPS 1024
#define NW_STATUS_FDS 256 /* --status-fd must lie below */

struct nw_caller {
	uid_t uid;
	gid_t gid, group[NW_CALLER_GROUPS];
	int groups;
	pid_t ppid;
	int parent; /* pidfd of the pilot, or -1 when it has none we can see */
	mode_t umask;
	char cwd[4096];
	int argc, envc;
	char **argv, **env;
	struct rlimit limit[RLIM_NLIMITS];
	uint64_t open[NW_STATUS_FDS / 64]; /* which descriptors the caller gave us */
};

/* Who the payload is, as the kernel sees it outside (uid, gid) and as it sees itself (inside_*). */
struct nw_identity {
	uid_t uid;
	gid_t gid;
	uid_t inside_uid;
	gid_t inside_gid;
	uint32_t block; /* ids in the leased block, first is "first" */
	uint32_t first;
	const struct nw_account *account; /* mode switch */
	int lock;                         /* of the id, ids/<lock_id>, -1 when shared */
	uint32_t lock_id;
};

struct nw_dir {
	const char *path;
	int fd;  /* O_PATH, opened as the caller; -1: none */
	int mnt; /* detached mount of it (privileged launchers), or -1 */
	dev_t dev;
	ino_t ino;
	uint64_t btime; /* of birth, ns; 0 where the file system has none */
};

/* What is left of the payload's work in what goes back, and what was done about it. */
struct nw_tally {
	uint64_t entries, symlinks, special, suid, foreign, flags, acls, removed, left;
	uint64_t bytes;             /* measured */
	uint64_t ipc, keys, shared; /* ipc.c: removed; keyrings cleared; left because others use the id too */
	bool by_time;               /* what was the run's was told by its time */
	char left_path[4][256];
};

#define NW_DEGRADES 16

/* One process alone, or the two of keeper.c. */
enum nw_role { NW_ALONE, NW_FRONT, NW_KEEPER };
#define NW_PILOT_DIED 255 /* among the signal numbers that the front passes on */

struct nw_run {
	const struct nw_launcher *launcher;
	struct nw_caller caller;
	enum nw_role role;
	pid_t keeper_pid, front_pid;
	int keeper, front; /* the socket between them, seen from the other side */
	bool heard;        /* the keeper has told: */
	int code;
	struct nw_err word;
	const char *guard_path;
	struct nw_guard guard;
	char *profiles; /* their text */
	size_t profiles_len;
	struct nw_profile profile;
	struct nw_decision decision;
	void *said; /* the child's frame, which the decision's strings lie in */
	struct nw_identity id;
	struct nw_dir work, expose[NW_EXPOSE];
	struct nw_dir image;          /* of a container: a file or a directory */
	struct nw_dir own;            /* launch_inside.c, */
	int words, inside, told;      /* what the runtime said, and the two ends of the socket for what that one tells; or -1 */
	enum nw_handover how; /* of the work directory */
	struct timespec given; /* when the payload got it; 0: not known */
	int64_t given_ahead;   /* of CLOCK_BOOTTIME, then */
	char run[37], boot[37], host[65];
	int leases, lease_fd, range; /* leases: their directory; range: lock of the block's ids */
	uint64_t lease_us;
	bool unswept;         /* dead leases that could not be finished are there */
	char cgroup[NW_PATH * 3]; /* the run's own group, "" when there is none */
	int cgroup_fd;
	uint32_t held; /* limits that it holds, a bit for each from NW_LIMIT_MEMORY on */
	char disk[NW_PATH + 40]; /* the run's directory below tmp-dir, "" when there is none */
	pid_t init, payload;     /* as seen from outside */
	int init_fd, payload_fd; /* pidfds */
	int init_sock, payload_sock;
	int userns; /* the payload's user namespace (userns launcher), or -1 */
	int netd, netns; /* private network: the connection that stays, and the namespace until init is in it; or -1 */
	uint32_t address; /* the payload's there, in the host's byte order; 0: none */
	char address6[48];       /* in words; "": no IPv6 */
	char remote[32][64]; /* where it connected to, for the record */
	int remotes;
	uint32_t session;        /* the kernel's audit session of the payload, AUDIT_SID_UNSET when it has none */
	int std[3]; /* what the payload gets as 0-2 */
	struct nw_err stdio; /* what of it was lost on the way */
	int tty;             /* the payload's own terminal, or -1 */
	bool terminal;       /* it has one */
	bool loginuid, keyring;
	int landlock; /* ABI of the kernel's, looked up where the profile asks for it */
	const char *degrade[NW_DEGRADES];
	int degrades;
	uint64_t started_us, start_mono_ms;
	bool unrecorded; /* audit failed and policy lets the run go on */
	bool swept;      /* finished from its lease, by somebody else (sweep.c) */
	/* how it ended */
	bool ended;
	int status, killed; /* wait status; processes that the end of the namespace killed */
	const char *why;    /* "wall", "pilot", "front", "swept", and of limits.c; NULL: by itself */
	struct rusage usage;
	int64_t oom_kills, memory_peak, forks_refused; /* by its cgroup; -1: not counted here */
	uint64_t end_mono_ms;
	int left; /* processes that could not be ended: 0, or cleanup failed */
	struct nw_tally tally;
};

int nwp_main(const struct nw_launcher *l, int argc, char **argv);
void nwp_init(struct nw_run *r, const struct nw_launcher *l);
int nwp_load_guard(struct nw_run *r, struct nw_err *e);
bool nwp_finish(struct nw_run *r, bool started);
void nwp_meanwhile(struct nw_run *r);

/* caller.c: take nothing from the caller unseen */
void nwp_close_callers(struct nw_caller *c, int keep);
int nwp_sanitise(struct nw_run *r, int argc, char **argv, struct nw_err *e);
int nwp_build_request(struct nw_run *r, struct nw_buf *b, struct nw_err *e);
bool nw_wants_credentials(int argc, char *const *argv, char *const *env);
int nwp_keep_time(struct nw_err *e);
int nwp_identify(struct nw_run *r, struct nw_err *e);
/* As the caller: file-system ids switched for the time of one call. */
int nwp_as_caller(const struct nw_run *r, bool on);
void nwp_tell(const struct nw_err *e);
void nwp_lost_ids(void) __attribute__((noreturn));
void nwp_as_pilot(const struct nw_run *r, bool on);

/* path.c */
int nwp_open_trusted(const char *path, uid_t owner, int flags, struct nw_err *e);
int nwp_check_trusted(int fd, uid_t owner, const char *path, const char *part, struct stat *st, struct nw_err *e);
char *nwp_read_trusted(const char *path, uid_t owner, size_t max, size_t *len, struct nw_err *e);
extern uid_t nwp_unmapped; /* id of what has none in this user namespace and counts as root's; 0: nothing does */
void nwp_unprivileged(void);
uint64_t nwp_mount_of(int fd);
int nwp_openat2(int dirfd, const char *path, uint64_t flags, uint64_t mode, uint64_t resolve);
uid_t nwp_trusted_owner(const struct nw_run *r);

/* child.c: ask the policy child; fills r->decision */
int nwp_ask(struct nw_run *r, struct nw_err *e);
void nwp_forget_files(const struct nw_run *r);

/* lease.c */
int nwp_lease(struct nw_run *r, struct nw_err *e);
int nwp_lease_write(struct nw_run *r, struct nw_err *e);
int nwp_lock_lease(int fd, int how);
int nwp_lease_starting(struct nw_run *r, struct nw_err *e);
int nwp_lease_release(struct nw_run *r);
int nwp_state_dir(struct nw_run *r, const char *name, struct nw_err *e);
int nwp_lock_range(struct nw_run *r, int dir, uint32_t first, uint32_t size, struct nw_err *e);
uint64_t nwp_ticks(pid_t pid);

/* sweep.c: what dead runs left */
int nwp_sweep_before(struct nw_run *r, struct nw_err *e);
int nwp_sweep_main(int argc, char **argv);

/* audit.c: append one record; durable when sync. *e has the code NW_UNSURE when it may have been written all the same. */
#define NW_UNSURE "NW-AUDIT-UNSURE"
int nwp_record(struct nw_run *r, const char *action, const struct nw_err *why, bool sync, struct nw_err *e);
void nwp_status(struct nw_run *r, const char *event, const struct nw_err *why, int code);
void nwp_glexec_syslog(struct nw_run *r);

/* Where the payload finds its image: a name in our own root, so that nothing of the profile's or the pilot's can be there. Twin: apptainer.py */
#define NW_IMAGE "/.image"

/* container.c. The payload's stderr, a socket and launch_inside.c are these descriptors of the runtime's; shells have use for those below 10. Twin:
 * apptainer.py */
#define NW_INSIDE 20
#define NW_SAID 4097
int nwp_container(struct nw_run *r, struct nw_err *e);
int nwp_hand_over(const struct nw_run *r);
int nwp_container_end(const struct nw_run *r, struct nw_err *e);

/* workdir.c: the caller's directories, opened once, as the caller */
int nwp_open_dirs(struct nw_run *r, struct nw_err *e);
int nwp_look_at(struct nw_dir *d);
int nwp_open_dir(struct nw_run *r, struct nw_dir *d, const char *path, struct nw_err *e);
int nwp_prepare_dirs(struct nw_run *r, struct nw_err *e);
int nwp_give_work(struct nw_run *r);
int nwp_take_back(struct nw_run *r);
int nwp_hear_walk(pid_t p, int fd[2], struct nw_tally *t);

/* isolate.c: init and its namespaces; root.c: its mounts; payload.c: what becomes the payload */
int nwp_start(struct nw_run *r, struct nw_err *e);
int nwp_go(struct nw_run *r, struct nw_err *e);
int nwp_gave_up(struct nw_run *r, struct nw_err *e);
int nwp_cgroup_path(struct nw_run *r, struct nw_err *e);
int nwp_open_cgroup(const struct nw_run *r);
int nwp_build_root(struct nw_run *r, struct nw_err *e);
int nwp_open_inside(struct nw_run *r, struct nw_err *e);
int nwp_degrade(struct nw_run *r, const char *what, struct nw_err *e);

/* net.c: a network of the run's own */
int nwp_network(struct nw_run *r, struct nw_err *e);
void nwp_network_end(struct nw_run *r);

/* What init and payload tell the launcher, over SOCK_SEQPACKET pairs. */
enum nw_news { NW_NEWS_ERROR = 1, NW_NEWS_BORN, NW_NEWS_READY, NW_NEWS_EXIT };
struct nw_msg {
	int what, status, killed; /* EXIT: wait status, processes still there */
	bool loginuid, keyring;   /* READY */
	struct nw_err err;        /* ERROR */
};
void nwp_payload(struct nw_run *r, int sock, int built, const void *filter, size_t len) __attribute__((noreturn));
char **nwp_build_env(const struct nw_run *r);
int nwp_exec(const char *name, char **argv, char **env, bool search);
int nw_exec_status(int err);
const char *nwp_env(char *const *env, const char *name);

/* landlock.c */
int nwp_landlock(const struct nw_run *r);

/* ids.c */
int nwp_policy_file(const struct nw_run *r, const char *name, void **data, size_t *len, struct nw_err *e);
int nwp_drop_bounding(void);
int nwp_keep_caps(uint64_t caps);
int nwp_set_groups(const struct nw_run *r);
int nwp_become(uid_t uid, gid_t gid, bool keep_groups);
int nwp_write_maps(struct nw_run *r, pid_t pid, struct nw_err *e);
int nwp_keep_chown(uid_t uid, gid_t gid, uint64_t caps);

/* keeper.c */
int nwp_split(struct nw_run *r, struct nw_err *e);
int nwp_let_go(void);
void nwp_keeper_tell(struct nw_run *r, int code, const struct nw_err *e);
void nwp_front_hear(struct nw_run *r);
int nwp_front_end(struct nw_run *r, struct nw_err *e);
void nwp_relay_leave(struct nw_run *r);
void nwp_close_payload_ends(struct nw_run *r);

/* supervise.c */
int nwp_relay_open(struct nw_run *r, struct nw_err *e);
void nwp_supervise(struct nw_run *r);
int nwp_cgroup(const struct nw_run *r, const char *file, const char *text);

/* limits.c */
struct nw_scratch {
	pid_t pid; /* of who is looking; 0: nobody */
	uint64_t next, began, most; /* when to look again, ms; UINT64_MAX: never */
};
void nwp_scratch_begin(const struct nw_run *r, struct nw_scratch *s);
bool nwp_look_at_scratch(struct nw_run *r, struct nw_scratch *s);
void nwp_scratch_end(const struct nw_scratch *s);
bool nwp_wants_cgroup(const struct nw_decision *d);
int nwp_hold_limits(struct nw_run *r, struct nw_err *e);
void nwp_put_limits(struct nw_json *j, const struct nw_run *r);
uint64_t nwp_scratch(const struct nw_run *r, uint64_t size);
void nwp_count(struct nw_run *r);

/* terminal.c */
bool nwp_is_terminal(int fd);
int nwp_reopen(const struct nw_run *r, int fd, int flags);
int nwp_terminal_open(struct nw_run *r, const bool *is, int *in, int *out);
void nwp_terminal_size(int from, int to);
bool nwp_terminal_take(int master);
bool nwp_terminal_wanted(void);
void nwp_terminal_rest(void);
void nwp_terminal_again(void);
void nwp_terminal_unguard(void);
void nwp_terminal_end(void);
bool nwp_terminal_stop_key(int tty, int master, char *bytes, size_t *n);

/* cleanup.c, tree.c */
void nwp_end_processes(struct nw_run *r);
int nwp_hand_back(struct nw_run *r);
int nwp_sweep_uid(const struct nw_run *r, uid_t uid, gid_t gid);
struct nw_walk {
	const char *top; /* absolute path of the tree, for links that name it */
	bool neutralise; /* remove what leads out, strip setuid bits */
	bool chown, last_try;      /* the last: give back directories in which something had to be left, too */
	bool measure;              /* nothing is changed: blocks are counted */
	bool remove;               /* everything of first..last goes; what is not theirs stays */
	const struct stat *keep;   /* and this one file, or NULL */
	uid_t first, last, to_uid; /* chown what belongs to first..last */
	gid_t to_gid;
	struct timespec since; /* what has not been changed since then stays as it is; 0: nothing is known to be so old */
};
void nwp_tree(int root, const struct nw_walk *w, struct nw_tally *t);
void nwp_tally_add(struct nw_tally *to, const struct nw_tally *t);
/* The entries of dir that belong to first..last, with all that is in them and theirs; dir itself stays, and *keep. Adds to *t. Before: become their
 * owner. */
void nwp_remove_owned(int dir, uid_t first, uid_t last, const struct stat *keep, struct nw_tally *t);

/* disk.c: private directories on disk */
int nwp_disk_path(struct nw_run *r, struct nw_err *e);
int nwp_disk_make(struct nw_run *r, struct nw_err *e);
int nwp_disk_remove(struct nw_run *r);

/* ipc.c: what outlives processes */
int nwp_share_id(struct nw_run *r, int ids, struct nw_err *e);
int nwp_clean_ipc(struct nw_run *r, bool stuck);

/* sys.c */
uint64_t nwp_now_ms(void);
sigset_t nwp_all_signals(void);
uint64_t nwp_realtime_us(void);
void nwp_close(int *fd);
int nwp_write_all(int fd, const void *p, size_t n);
int nwp_write_file(const char *path, const char *text);
DIR *nwp_list(int dir);
struct dirent *nwp_entry(DIR *d, bool *bad);
int nwp_open_fs(const struct nw_run *r, const char *type, const char *place);
int nwp_wait(pid_t p, int ms);
pid_t nwp_hold_namespace(void);
int nwp_pidfd_open(pid_t pid);
int nwp_pidfd_signal(int fd, int sig);
ssize_t nwp_send_fd(int sock, const void *p, size_t n, int fd, int flags);
ssize_t nwp_receive_fd(int sock, void *p, size_t n, int flags, pid_t *pid, int *fd);
bool nwp_is_reaped(int fd);

#endif

/* Run a command and end one of its processes at its n-th system call, or make that call fail, or just list them all. For tests/crash; root, x86-64.
 *
 *     nth -o FD [-u UID -g GID [-G GID,...]] [-t SECONDS] [-p NAME] [-x FILE] [-l | POINT...] -- COMMAND...
 *
 * Root may trace a setuid program without taking its privilege away (ptrace(2), LSM_UNSAFE_PTRACE: the tracer has CAP_SYS_PTRACE), so what runs is the real
 * thing. Processes are named by their place: 0 is COMMAND's, 0.2 its second child, in the order of fork. A program NAME (-p: the payload) is let go
 * at its exec. Calls are counted from 1, per place, from COMMAND's exec on. Points, each at call N of PLACE:
 *
 *     -k PLACE:N[:MS]    KILL it before the call is executed, after holding it there for MS while the others go on
 *     -a PLACE:N[:MS]    KILL it when the call has been executed, before it learns the result
 *     -w PLACE:0:MS      KILL it MS after the payload was let go, in whatever call it waits: how many calls that took is not the same in every run
 *     -A PLACE:N[:MS]    KILL every process at once, before the call: what cgroup.kill does, or a power cut
 *     -f PLACE:N:ERRNO   the call is not executed and returns ERRNO (close(2): is executed, as the kernel does)
 *     -s PLACE:N         the call, a write or send, takes half of the bytes
 *
 * Lines on FD, words as in struct line below: "call" and "exec" with -l; "born" with -l; "hit" for a point that was reached; "hang" for each process that
 * was still there after SECONDS, when all are killed; last of all "end" with the wait status of place 0, and "free" N, the milliseconds from the end of
 * place 0 to that of the last process. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PROCS 4096
#define POINTS 8
#define PLACE 64
#define STRAY_MS 300 /* a child whose parent died before it could tell of it, or it would have told by then */

struct point {
	char what; /* k a w A f s */
	char place[PLACE];
	unsigned n;
	int arg;
	bool hit;
};

struct proc {
	pid_t pid; /* 0: free */
	char place[PLACE];
	unsigned calls, children;
	unsigned long long nr;     /* of the last call */
	bool waits;                /* in its first stop, not yet named */
	unsigned long long wanted; /* argument of the brk that we let fail */
	bool quiet;                /* before COMMAND's exec */
	uint64_t born_ms, held_ms; /* held at a point until then */
	struct point *at;          /* the point to finish at the call's exit, or held for */
};

static struct proc procs[PROCS];
static struct point points[POINTS];
static int npoints, strays;
static bool list;
static const char *payload = "", *file;
static FILE *out;
static pid_t first;
static int first_status = -1;
static uint64_t first_ended_ms, payload_ms; /* when the payload was let go */

static void __attribute__((noreturn, format(printf, 1, 2))) die(const char *fmt, ...) {
	va_list ap;
	va_start(ap, fmt);
	fprintf(stderr, "nth: ");
	vfprintf(stderr, fmt, ap);
	fprintf(stderr, ": %s\n", strerror(errno));
	_exit(99); /* PTRACE_O_EXITKILL: what is traced dies with us */
}

static uint64_t now_ms(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static struct proc *find(pid_t pid) {
	struct proc *spare = NULL;
	for (int i = 0; i < PROCS; i++) {
		if (procs[i].pid == pid) return &procs[i];
		if (!spare && !procs[i].pid) spare = &procs[i];
	}
	if (!spare) die("more than %d processes", PROCS);
	*spare = (struct proc){ .pid = pid, .born_ms = now_ms() };
	return spare;
}

static bool wanted(const struct proc *p) {
	bool is = list && !p->quiet;
	for (int i = 0; i < npoints; i++) is |= points[i].n > 0 && strcmp(points[i].place, p->place) == 0;
	return is;
}

/* A tracee that was killed meanwhile is in no stop any more: its end is about to be told. */
static void go_on(struct proc *p, int signal) {
	if (ptrace(wanted(p) ? PTRACE_SYSCALL : PTRACE_CONT, p->pid, 0, signal) && errno != ESRCH) die("continue %s", p->place);
}

static void name_of(pid_t pid, const char *file, char *to, size_t size) {
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, file);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? 0 : read(fd, to, size - 1);
	if (fd >= 0) close(fd);
	to[n > 0 ? n : 0] = 0;
	to[strcspn(to, "\n")] = 0;
}

/* What the call is about: the path in its memory, or the file behind its descriptor. */
static void subject(pid_t pid, const struct __ptrace_syscall_info *s, char *to, size_t size) {
	static const int at0[] = { SYS_execve, SYS_mkdir, SYS_rmdir, SYS_unlink, SYS_access, SYS_chdir, SYS_open, SYS_chmod, SYS_truncate };
	static const int at1[] = { SYS_openat, SYS_openat2, SYS_mkdirat, SYS_unlinkat, SYS_newfstatat };
	static const int fds[] = { SYS_write, SYS_read, SYS_pwrite64, SYS_pread64, SYS_fsync, SYS_fdatasync, SYS_flock, SYS_ftruncate, SYS_close };
	unsigned long address = 0;
	char path[64];
	bool fd = false;
	for (size_t i = 0; i < sizeof at0 / sizeof *at0; i++) address = (int)s->entry.nr == at0[i] ? s->entry.args[0] : address;
	for (size_t i = 0; i < sizeof at1 / sizeof *at1; i++) address = (int)s->entry.nr == at1[i] ? s->entry.args[1] : address;
	for (size_t i = 0; i < sizeof fds / sizeof *fds; i++) fd |= (int)s->entry.nr == fds[i];
	to[0] = 0;
	snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)pid, (int)s->entry.args[0]);
	ssize_t n = fd ? readlink(path, to, size - 1) : 0;
	if (address) {
		size_t most = 4096 - address % 4096;
		struct iovec mine = { to, size - 1 }, its = { (void *)(uintptr_t)address, most < size - 1 ? most : size - 1 };
		n = process_vm_readv(pid, &mine, 1, &its, 1, 0);
	}
	to[n > 0 ? n : 0] = 0;
	for (char *c = to; *c; c++)
		if (*c < 0x21 || *c > 0x7e) *c = '?';
}

static void kill_all(void) {
	for (int i = 0; i < PROCS; i++)
		if (procs[i].pid) kill(procs[i].pid, SIGKILL);
}

static void act(struct proc *p, const struct point *x) {
	if (x->what == 'A') kill_all();
	else kill(p->pid, SIGKILL); /* in a stop: it wakes up only to die (signal(7)) */
}

/* 0: it stays where it is, dead or held. */
static int arrive(struct proc *p, struct point *x) {
	x->hit = true;
	fprintf(out, "hit %s %u %llu\n", p->place, p->calls, p->nr);
	p->at = x;
	p->held_ms = x->arg ? now_ms() + (uint64_t)x->arg : 0;
	if (!x->arg) act(p, x);
	return 0;
}

/* Its registers, got or set. 0, or -1 when it has just been killed by somebody else. */
static int registers(struct proc *p, int how, struct user_regs_struct *r) {
	if (ptrace(how, p->pid, 0, r) == 0) return 0;
	if (errno != ESRCH) die("registers of %s", p->place);
	return -1;
}

static void change(struct proc *p, struct point *x, const struct __ptrace_syscall_info *s) {
	struct user_regs_struct r;
	x->hit = true;
	fprintf(out, "hit %s %u %llu\n", p->place, p->calls, p->nr);
	if (registers(p, PTRACE_GETREGS, &r)) return;
	if (x->what == 's') r.rdx /= 2;
	else p->at = x;                                                          /* the rest at its exit */
	if (s->entry.nr == SYS_brk) { /* fails by leaving the break where it is (brk(2)): an errno would be taken for an address */
		p->wanted = r.rdi;
		r.rdi = 0;
	} else if (x->what == 'f' && s->entry.nr != SYS_close) r.orig_rax = SYS_getpid; /* not -1: a seccomp filter may be on */
	registers(p, PTRACE_SETREGS, &r);
}

static int entry(struct proc *p, const struct __ptrace_syscall_info *s) {
	char text[256];
	if (p->quiet) return 1;
	p->calls++;
	p->nr = s->entry.nr;
	if (list) {
		subject(p->pid, s, text, sizeof text);
		fprintf(out, "call %s %u %llu %s\n", p->place, p->calls, p->nr, text);
	}
	for (int i = 0; i < npoints; i++) {
		struct point *x = &points[i];
		if (x->hit || x->n != p->calls || strcmp(x->place, p->place)) continue;
		if (x->what == 'k' || x->what == 'A') return arrive(p, x);
		if (x->what == 'a') p->at = x;
		else if (x->what == 'f' || s->entry.nr == SYS_write || s->entry.nr == SYS_pwrite64) change(p, x, s); /* half of a read is nothing that happens */
	}
	return 1;
}

static int leave(struct proc *p) {
	struct point *x = p->at;
	struct user_regs_struct r;
	p->at = NULL;
	if (!x) return 1;
	if (x->what == 'a') return arrive(p, x);
	if (registers(p, PTRACE_GETREGS, &r)) return 1;
	if (p->nr == SYS_brk) r.rdi = p->wanted; /* a call keeps its arguments' registers */
	else r.rax = (unsigned long long)-(long long)x->arg;
	registers(p, PTRACE_SETREGS, &r);
	return 1;
}

static void call_stop(struct proc *p) {
	struct __ptrace_syscall_info s;
	if (ptrace(PTRACE_GET_SYSCALL_INFO, p->pid, sizeof s, &s) < 0) {
		if (errno == ESRCH) return;
		die("call of %s", p->place);
	}
	if (s.op == PTRACE_SYSCALL_INFO_ENTRY ? entry(p, &s) : leave(p)) go_on(p, 0);
}

static void born(struct proc *parent) {
	unsigned long pid;
	if (ptrace(PTRACE_GETEVENTMSG, parent->pid, 0, &pid)) return;
	struct proc *p = find((pid_t)pid);
	if (p->place[0]) return; /* named as a stray meanwhile */
	if (snprintf(p->place, PLACE, "%.48s.%u", parent->place, ++parent->children) >= PLACE) die("too deep");
	p->quiet = parent->quiet;
	if (list) fprintf(out, "born %s %d\n", p->place, (int)p->pid);
	if (p->waits) {
		p->waits = false;
		go_on(p, 0);
	}
}

static void executed(struct proc *p) {
	char comm[32];
	name_of(p->pid, "comm", comm, sizeof comm);
	if (p->pid == first) p->quiet = false;
	if (list) fprintf(out, "exec %s %u %s\n", p->place, p->calls, comm);
	if (payload[0] && strncmp(comm, payload, 15) == 0) {
		if (ptrace(PTRACE_DETACH, p->pid, 0, 0) && errno != ESRCH) die("let %s go", p->place);
		p->pid = 0;
		payload_ms = now_ms();
	} else go_on(p, 0);
}

static void stopped(struct proc *p, int signal, int event) {
	switch (event) {
	case PTRACE_EVENT_FORK:
	case PTRACE_EVENT_VFORK:
	case PTRACE_EVENT_CLONE: born(p); break;
	case PTRACE_EVENT_EXEC: executed(p); return;
	case PTRACE_EVENT_STOP:
		if (signal != SIGTRAP) { /* a group stop: stays stopped, and we hear of SIGCONT */
			ptrace(PTRACE_LISTEN, p->pid, 0, 0);
			return;
		}
		p->waits = !p->place[0];
		if (p->waits) return;
		break;
	case 0:
		if (signal == (SIGTRAP | 0x80)) {
			call_stop(p);
			return;
		}
		go_on(p, signal);
		return;
	}
	go_on(p, 0);
}

static void ended(struct proc *p, int status) {
	if (p->pid == first) first_status = status, first_ended_ms = now_ms();
	if (list) fprintf(out, "gone %s %u\n", p->place, (unsigned)status);
	p->pid = 0;
}

/* Points of -w whose time has come. */
static void strike(uint64_t now) {
	for (int i = 0; payload_ms && i < npoints; i++) {
		struct point *x = &points[i];
		if (x->what != 'w' || x->hit || now < payload_ms + (uint64_t)x->arg) continue;
		for (struct proc *p = procs; p < procs + PROCS; p++) {
			if (!p->pid || strcmp(p->place, x->place)) continue;
			x->hit = true;
			fprintf(out, "hit %s %u %llu\n", p->place, p->calls, p->nr);
			kill(p->pid, SIGKILL);
		}
	}
}

/* idle: nobody has anything to tell at the moment, a parent of its child neither. */
static void tick(bool idle) {
	uint64_t now = now_ms();
	strike(now);
	for (int i = 0; i < PROCS; i++) {
		struct proc *p = &procs[i];
		if (!p->pid) continue;
		if (p->held_ms && now >= p->held_ms) {
			p->held_ms = 0;
			act(p, p->at);
		}
		if (idle && p->waits && now - p->born_ms > STRAY_MS) {
			snprintf(p->place, PLACE, "?%d", ++strays);
			p->waits = false;
			go_on(p, 0);
		}
	}
}

static void hung(void) {
	char text[256];
	for (int i = 0; i < PROCS; i++) {
		if (!procs[i].pid) continue;
		name_of(procs[i].pid, "syscall", text, sizeof text);
		fprintf(out, "hang %s %u %s\n", procs[i].place, procs[i].calls, text);
	}
	kill_all();
}

static void nothing(int signal) {
	(void)signal;
}

static void watch(uint64_t limit_ms) {
	struct sigaction a = { .sa_handler = nothing };
	struct itimerval often = { { 0, 10000 }, { 0, 10000 } };
	uint64_t begin = now_ms();
	bool over = false;
	if (sigaction(SIGALRM, &a, NULL) || setitimer(ITIMER_REAL, &often, NULL)) die("timer");
	for (;;) {
		int status;
		pid_t pid = waitpid(-1, &status, __WALL);
		if (pid < 0 && errno == ECHILD) break;
		if (pid < 0 && errno != EINTR) die("wait");
		tick(pid < 0);
		if (!over && now_ms() - begin > limit_ms) {
			over = true;
			hung();
		}
		if (over && now_ms() - begin > limit_ms + 5000) break; /* not even SIGKILL helps: the lines are written */
		if (pid < 0) continue;
		struct proc *p = find(pid);
		if (WIFSTOPPED(status)) stopped(p, WSTOPSIG(status), status >> 16);
		else ended(p, status);
	}
}

/* All lines at the end, and by write(2): the timer interrupts it, and stdio loses what it was writing then. */
static int tell(int fd, const char *p, size_t n) {
	while (n > 0) {
		ssize_t w = write(fd, p, n);
		if (w < 0 && errno != EINTR) return 1;
		if (w > 0) p += w, n -= (size_t)w;
	}
	return 0;
}

static void parse_point(char what, char *text) {
	struct point *x = &points[npoints++];
	char *n = strchr(text, ':'), *arg = n ? strchr(n + 1, ':') : NULL;
	if (npoints > POINTS || !n || n - text >= PLACE) die("point %s", text);
	*x = (struct point){ .what = what, .n = (unsigned)atoi(n + 1), .arg = arg ? atoi(arg + 1) : 0 };
	memcpy(x->place, text, (size_t)(n - text));
}

static int parse_groups(char *text, gid_t *group) {
	int n = 0;
	for (char *t = strtok(text, ","); t && n < 64; t = strtok(NULL, ",")) group[n++] = (gid_t)atoi(t);
	return n;
}

int main(int argc, char **argv) {
	uid_t uid = getuid();
	gid_t gid = getgid(), group[64];
	char *lines = NULL;
	size_t size = 0;
	int c, groups = 0, seconds = 60, fd = -1, go[2];
	while ((c = getopt(argc, argv, "+o:u:g:G:t:p:x:lk:a:w:A:f:s:")) != -1) switch (c) {
		case 'o': fd = atoi(optarg); break;
		case 'u': uid = (uid_t)atoi(optarg); break;
		case 'g': gid = (gid_t)atoi(optarg); break;
		case 'G': groups = parse_groups(optarg, group); break;
		case 't': seconds = atoi(optarg); break;
		case 'p': payload = optarg; break;
		case 'x': file = optarg; break;
		case 'l': list = true; break;
		case '?': return 2;
		default: parse_point((char)c, optarg);
		}
	if (optind >= argc || fd < 3 || fcntl(fd, F_SETFD, FD_CLOEXEC) || !(out = open_memstream(&lines, &size))) die("usage");
	if (pipe2(go, O_CLOEXEC) || (first = fork()) < 0) die("fork");
	if (first == 0) {
		char b;
		if (read(go[0], &b, 1) != 1 || setgroups((size_t)groups, group) || setresgid(gid, gid, gid) || setresuid(uid, uid, uid)) _exit(98);
		execv(file ? file : argv[optind], argv + optind);
		_exit(98);
	}
	long options =
		PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE | PTRACE_O_TRACEEXEC | PTRACE_O_EXITKILL;
	struct proc *p = find(first);
	snprintf(p->place, PLACE, "0");
	p->quiet = true;
	if (ptrace(PTRACE_SEIZE, first, 0, options)) die("seize");
	if (ptrace(PTRACE_INTERRUPT, first, 0, 0) || write(go[1], "", 1) != 1) die("start");
	watch((uint64_t)seconds * 1000);
	fprintf(out, "free %llu\nend %d\n", (unsigned long long)(first_ended_ms ? now_ms() - first_ended_ms : 0), first_status);
	return fclose(out) || tell(fd, lines, size);
}

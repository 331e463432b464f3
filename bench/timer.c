/* Start-to-exit times of commands, one after the other in rounds, so that a slow spell of the machine hits all alike.
 *
 *     timer RUNS WARMUP [MOUNTS DIRECTORY] <CASES >SAMPLES
 *
 * CASES: lines "case NAME", then any of "uid N", "gid N…" (the first is the primary one), "env NAME=value", "link PATH TARGET" (PATH becomes a link to TARGET before each start),
 * "fd9 PATH" (opened anew for each start), then "arg WORD" for each word of the command. Time is from vfork() to the return of wait4(), CLOCK_MONOTONIC.
 * Before each start it waits up to 0.1 s for a moment when nothing else is runnable (/proc/loadavg counts ourselves); a start without one is "busy".
 * Under a real-time policy, which the commands inherit, others do not matter.
 * With MOUNTS it first makes as many mounts below DIRECTORY, in a mount namespace of its own.
 * SAMPLES: a line a case: name, failed starts, busy starts, then the microseconds of each good start, tab between. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CASES 64
#define WORDS 256
#define SETTLE 30000 /* us: what a command put off until after its end must not fall on the next one */

struct one {
	char *name, *argv[WORDS], *env[WORDS], *link, *target, *fd9;
	gid_t gid[32];
	int uid, gids, args, envs, failed, busy, good;
	double *us;
};

extern char **environ;
static struct one cases[CASES];
static int count;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void read_line(char *line)
{
	struct one *c = count ? &cases[count - 1] : NULL;
	char *value = strchr(line, ' ');

	if (!value || !(value = strdup(value + 1))) die(line);
	if (strncmp(line, "case ", 5) == 0 && count < CASES) cases[count++] = (struct one){ .name = value, .uid = -1 };
	else if (c && strncmp(line, "uid ", 4) == 0) c->uid = atoi(value);
	else if (c && strncmp(line, "gid ", 4) == 0 && c->gids < 32) c->gid[c->gids++] = (gid_t)atoi(value);
	else if (c && strncmp(line, "env ", 4) == 0 && c->envs < WORDS - 1) c->env[c->envs++] = value;
	else if (c && strncmp(line, "arg ", 4) == 0 && c->args < WORDS - 1) c->argv[c->args++] = value;
	else if (c && strncmp(line, "fd9 ", 4) == 0) c->fd9 = value;
	else if (c && strncmp(line, "link ", 5) == 0) c->link = strsep(&value, " "), c->target = value;
	else die(line);
}

static void make_mounts(int n, const char *dir)
{
	char path[4096];

	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) || mount("bench", dir, "tmpfs", 0, NULL)) die(dir);
	for (int i = 0; i < n; i++) {
		snprintf(path, sizeof path, "%s/%d", dir, i);
		if (mkdir(path, 0755) || mount("bench", path, "tmpfs", 0, "size=64k")) die(path);
	}
}

/* True when nothing else wanted a processor. */
static int quiet(void)
{
	static int fd = -1;
	char text[128];
	int running, n;

	if (sched_getscheduler(0) == SCHED_FIFO) return 1;
	if (fd < 0) fd = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
	for (int i = 0; i < 50; i++) {
		n = (int)pread(fd, text, sizeof text - 1, 0);
		text[n > 0 ? n : 0] = 0;
		if (sscanf(text, "%*f %*f %*f %d/", &running) == 1 && running <= 1) return 1;
		usleep(2000);
	}
	return 0;
}

static void prepare(struct one *c)
{
	char new[4096];
	int fd;

	close(9);
	if (c->link) {
		snprintf(new, sizeof new, "%s.new", c->link);
		unlink(new);
		if (symlink(c->target, new) || rename(new, c->link)) die(c->link);
	}
	if (!c->fd9) return;
	fd = open(c->fd9, O_RDONLY);
	if (fd < 0 || dup2(fd, 9) != 9) die(c->fd9);
	if (fd != 9) close(fd);
}

/* The raw calls: this process has one thread, and between vfork and exec it borrows its parent's memory. */
static void become(struct one *c)
{
	if (c->gids && (syscall(SYS_setgroups, c->gids, c->gid) || syscall(SYS_setresgid, *c->gid, *c->gid, *c->gid))) _exit(125);
	if (c->uid >= 0 && syscall(SYS_setresuid, c->uid, c->uid, c->uid)) _exit(125);
	execvpe(c->argv[0], c->argv, c->env);
	_exit(126);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void start(struct one *c, int keep)
{
	int status, calm;
	double begin, end;
	pid_t pid;

	prepare(c);
	usleep(SETTLE);
	calm = quiet();
	begin = now();
	pid = vfork();
	if (pid == 0) become(c);
	while (pid > 0 && wait4(pid, &status, 0, NULL) < 0 && errno == EINTR)
		;
	end = now();
	if (pid < 0) die("vfork");
	if (!keep) return;
	c->busy += !calm;
	if (status) c->failed++;
	else c->us[c->good++] = end - begin;
}

int main(int argc, char **argv)
{
	int runs = argc > 2 ? atoi(argv[1]) : 0, warmup = argc > 2 ? atoi(argv[2]) : 0, null = open("/dev/null", O_RDWR | O_CLOEXEC);
	int out = fcntl(1, F_DUPFD_CLOEXEC, 10);
	char *line = NULL;
	size_t size = 0;
	ssize_t n;

	while ((n = getline(&line, &size, stdin)) > 0) {
		line[n - 1] = 0;
		read_line(line);
	}
	for (int i = 0; i < count; i++) {
		for (char **e = environ; *e && cases[i].envs < WORDS - 1; e++) cases[i].env[cases[i].envs++] = *e;
		if (!(cases[i].us = calloc((size_t)runs, sizeof(double)))) die("memory");
	}
	if (argc > 4) make_mounts(atoi(argv[3]), argv[4]);
	if (dup2(null, 0) || dup2(null, 1) != 1 || dup2(null, 2) != 2) die("/dev/null");
	for (int round = -warmup; round < runs; round++)
		for (int i = 0; i < count; i++) start(&cases[i], round >= 0);
	for (int i = 0; i < count; i++) {
		dprintf(out, "%s\t%d\t%d", cases[i].name, cases[i].failed, cases[i].busy);
		for (int k = 0; k < cases[i].good; k++) dprintf(out, "\t%.1f", cases[i].us[k]);
		dprintf(out, "\n");
	}
	return 0;
}

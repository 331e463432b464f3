/* Two small programs of the soak (soak.py).
 *
 * nw-soak NONCE MS WHAT   the payload. First of all NONCE and a newline go to stdout: no record, no exec (I6). Then what the letters of WHAT say, in
 *                         its current directory; after MS milliseconds it ends with status 7. What fails (a full disk, a filter) is left out.
 *                         d daemons, f a storm of forks, i IPC objects, l links and rights, s deaf to all signals, w files of some size
 * nw-soak -s CGROUP UID GID GROUP,... COMMAND...   the command in that cgroup (-: where we are) and with these ids. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <grp.h>
#include <mqueue.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static void wait_ms(long ms) {
	struct timespec t = { ms / 1000, ms % 1000 * 1000000 };
	while (nanosleep(&t, &t))
		;
}

static void be_deaf(void) {
	sigset_t all;
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, NULL);
}

/* Not a child of ours, not of our session, deaf, and with our descriptors. */
static void leave_daemon(void) {
	if (fork()) return;
	setsid();
	be_deaf();
	if (fork()) _exit(0);
	for (;;) wait_ms(60000);
}

/* Each has a child and ends: nobody is there when somebody looks. */
static void storm(void) {
	if (fork()) return;
	setsid();
	for (int generation = 0; generation < 25; generation++) {
		pid_t p = fork();
		if (p) _exit(0);
		if (generation % 5 == 0 && fork() == 0)
			for (;;) wait_ms(60000);
	}
	for (;;) wait_ms(60000);
}

static void make_ipc(const char *nonce) {
	char name[64];
	snprintf(name, sizeof name, "/nw-soak-%s", nonce);
	int shm = shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0600), sem = semget(IPC_PRIVATE, 1, IPC_CREAT | 0600), msg = msgget(IPC_PRIVATE, IPC_CREAT | 0600);
	int posix = shm_open(name, O_RDWR | O_CREAT, 0600), queue = mq_open(name, O_RDWR | O_CREAT, 0600, NULL);
	if (shm >= 0 && sem >= 0 && msg >= 0 && posix >= 0 && queue >= 0) return; /* else: a profile that has a filter or no such file system */
}

static void make_links(void) {
	int fd = open("suid", O_WRONLY | O_CREAT, 0755);
	if (mkdir("deep", 0700) == 0 && mkdir("deep/closed", 0700) == 0 && symlink("/etc/passwd", "deep/closed/out") == 0) chmod("deep/closed", 0);
	if (fd < 0 || close(fd) || chmod("suid", 06755) || symlink("../../..", "up") || symlink("deep", "fine") || mkfifo("fifo", 0666)) return;
}

static void make_files(long ms) {
	static char block[8192];
	for (int i = 0; i < 16; i++, wait_ms(ms / 16)) {
		char name[32];
		snprintf(name, sizeof name, "file-%d", i);
		int fd = open(name, O_WRONLY | O_CREAT | O_APPEND, 0600);
		if (fd < 0 || write(fd, block, sizeof block) < 0 || close(fd)) continue;
	}
}

static int start(char **argv) {
	char path[512];
	gid_t group[64];
	int n = 0, fd;
	snprintf(path, sizeof path, "%s/cgroup.procs", argv[0]);
	if (strcmp(argv[0], "-") && ((fd = open(path, O_WRONLY | O_CLOEXEC)) < 0 || write(fd, "0", 1) != 1)) return perror(path), 125;
	for (char *g = strtok(argv[3], ","); g && n < 64; g = strtok(NULL, ",")) group[n++] = (gid_t)atoi(g);
	uid_t uid = (uid_t)atoi(argv[1]);
	gid_t gid = (gid_t)atoi(argv[2]);
	if (setgroups((size_t)n, group) || setresgid(gid, gid, gid) || setresuid(uid, uid, uid)) return perror("ids"), 125;
	execv(argv[4], argv + 4);
	return perror(argv[4]), 125;
}

int main(int argc, char **argv) {
	char line[80];
	if (argc > 6 && strcmp(argv[1], "-s") == 0) return start(argv + 2);
	if (argc != 4) return 2;
	int n = snprintf(line, sizeof line, "%s\n", argv[1]);
	if (write(1, line, (size_t)n) != n) return 1; /* one write: whole, among those of all others */
	long ms = atol(argv[2]);
	for (const char *c = argv[3]; *c; c++) {
		if (*c == 's') be_deaf();
		if (*c == 'd')
			for (int i = 0; i < 3; i++) leave_daemon();
		if (*c == 'f') storm();
		if (*c == 'i') make_ipc(argv[1]);
		if (*c == 'l') make_links();
		if (*c == 'w') make_files(ms);
	}
	wait_ms(ms);
	return 7;
}

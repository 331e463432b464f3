/* The payload of the crash matrix: says that it was executed, then does what cleaning up is about. nw-crash NONCE [DAEMONS [files [stay]]]
 *
 * First of all NONCE goes to stdout: no record, no exec (I6). Then, in its current directory, links that lead out, rights, devices' relatives and a
 * tree; what outlives processes, in the kernel and in /tmp; DAEMONS processes in sessions of their own that ignore every signal, with NONCE in their command line; and it ends with status 7, or stays, under the name "nw-main". */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/prctl.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <unistd.h>

static int make_tree(void) {
	int fd = open("out", O_WRONLY | O_CREAT | O_TRUNC, 0600), bad = fd < 0 || write(fd, "result\n", 7) != 7 || close(fd);
	if (mkdir("deep", 0700) || mkdir("deep/er", 0700) || mkdir("closed", 0700)) bad = 1;
	bad |= (fd = open("deep/er/suid", O_WRONLY | O_CREAT, 0755)) < 0 || close(fd);
	bad |= (fd = open("closed/file", O_WRONLY | O_CREAT, 0)) < 0 || close(fd);
	chmod("deep/er/suid", 04755); /* may be refused */
	bad |= symlink("/etc/passwd", "deep/escape") || symlink("er", "deep/fine") || mkfifo("deep/fifo", 0666) || chmod("closed", 0);
	return bad;
}

/* Profile strict may forbid some of it. */
static void leave_ipc(const char *nonce) {
	char path[64] = "/tmp/nw-crash-";
	shmget(IPC_PRIVATE, 4096, 0600);
	semget(IPC_PRIVATE, 2, 0);
	msgget(IPC_PRIVATE, 0600);
	close(open(strncat(path, nonce, 32), O_WRONLY | O_CREAT | O_EXCL, 0600));
}

/* Not a child of ours, not of our session, deaf, and with our descriptors: what keeps a pilot waiting. */
static void leave_daemon(void) {
	sigset_t all;
	sigfillset(&all);
	if (fork()) return;
	setsid();
	if (fork()) _exit(0);
	sigprocmask(SIG_BLOCK, &all, NULL);
	for (;;) sleep(60);
}

int main(int argc, char **argv) {
	int daemons = argc > 2 ? atoi(argv[2]) : 0;
	if (argc < 2 || write(1, argv[1], strlen(argv[1])) != (ssize_t)strlen(argv[1])) return 1;
	if (argc > 3 && make_tree()) return 2;
	leave_ipc(argv[1]);
	for (int i = 0; i < daemons; i++) leave_daemon();
	if (argc > 4 && prctl(PR_SET_NAME, "nw-main") == 0)
		for (;;) pause();
	return 7;
}

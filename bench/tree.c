/* A payload with many processes.
 *
 *     tree idle N     N processes, each in a session of its own, asleep; when all are there the first one prints how many it sees, waits for
 *                     the end of its stdin, and ends
 *     tree bomb       processes that fork and end for ever, as many as RLIMIT_NPROC lets; the first one waits for the end of its stdin
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void grow(int n)
{
	for (int left = n - 1, part = (left + 7) / 8; left > 0;) {
		int k = part < left ? part : left;
		pid_t p = fork();

		if (p == 0) {
			setsid();
			grow(k);
			for (;;) pause();
		}
		if (p < 0) return;
		left -= k;
	}
}

static void bomb(void)
{
	unsigned dice = 1, first = 1; /* the first one never ends, or a moment without room would end them all */

	signal(SIGCHLD, SIG_IGN);
	for (;;) {
		pid_t p = fork();

		dice = (dice + (unsigned)getpid()) * 2654435761u;
		if (p == 0) first = 0;
		else if (!first && !(dice >> 16 & (p < 0 ? 63 : 3))) _exit(0); /* somebody else takes the place */
	}
}

static int count(void)
{
	DIR *d = opendir("/proc");
	int n = 0;

	for (struct dirent *e; d && (e = readdir(d));) n += isdigit((unsigned char)e->d_name[0]) != 0;
	return n;
}

int main(int argc, char **argv)
{
	int want = argc > 2 ? atoi(argv[2]) : 0;

	if (argc < 2) return 1;
	if (strcmp(argv[1], "bomb") == 0) {
		if (fork() == 0) bomb();
	} else {
		grow(want);
		for (int i = 0; i < 600 && count() < want; i++) usleep(50000);
		printf("%d\n", count());
		fflush(stdout);
	}
	while (read(0, &want, 1) > 0) {}
	_exit(0);
}

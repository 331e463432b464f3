/* Trees to walk: `grow TOP SHAPE UID [N]`. Makes TOP and below it, all of UID:
 *
 *     wide N     N empty files in one directory
 *     dirs N     N / 1,000 directories with 1,000 empty files each
 *     deep N     N directories one in the other
 *     mixed N    about N files of up to 8 KB in directories of uneven size, as a kernel's sources */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char bytes[8192];
static uid_t uid;
static unsigned seed = 1;

static void check(int bad, const char *what)
{
	if (!bad) return;
	perror(what);
	exit(1);
}

static unsigned some(unsigned n)
{
	seed = seed * 1103515245 + 12345;
	return (seed >> 8) % n;
}

static void file(const char *name, size_t size)
{
	int fd = open(name, O_CREAT | O_WRONLY | O_EXCL, 0644);

	check(fd < 0 || (size && write(fd, bytes, size) != (ssize_t)size) || fchown(fd, uid, uid), name);
	close(fd);
}

static void dir(const char *name)
{
	check(mkdir(name, 0755) || chown(name, uid, uid) || chdir(name), name);
}

static int files(int n, int size)
{
	char name[32];

	for (int i = 0; i < n; i++) {
		snprintf(name, sizeof name, "file%06d", i);
		file(name, size ? some((unsigned)size) : 0);
	}
	return n;
}

static int mixed(int files_wanted)
{
	char name[32];
	int made = 0;

	for (int a = 0; made < files_wanted; a++) {
		snprintf(name, sizeof name, "sub%d", a);
		dir(name);
		for (int b = 0; b < (a % 20 == 3 ? 300 : 20) && made < files_wanted; b++) {
			int below = some(8);

			snprintf(name, sizeof name, "part%d", b);
			dir(name);
			made += files(10 + (int)some(10), 8000);
			for (int c = 0; c < below; c++) {
				snprintf(name, sizeof name, "more%d", c);
				dir(name);
				made += files(8 + (int)some(8), 8000);
				check(chdir(".."), "..");
			}
			check(chdir(".."), "..");
		}
		check(chdir(".."), "..");
	}
	return made;
}

int main(int argc, char **argv)
{
	char name[32];
	int n = argc > 4 ? atoi(argv[4]) : 0;

	if (argc < 5) return 2;
	uid = (uid_t)atol(argv[3]);
	dir(argv[1]);
	if (!strcmp(argv[2], "wide")) files(n, 0);
	else if (!strcmp(argv[2], "deep"))
		while (n--) dir("d");
	else if (!strcmp(argv[2], "mixed")) mixed(n);
	else if (!strcmp(argv[2], "dirs"))
		for (int i = 0; i < n / 1000; i++) {
			snprintf(name, sizeof name, "dir%06d", i);
			dir(name);
			files(1000, 0);
			check(chdir(".."), "..");
		}
	else return 2;
	return 0;
}

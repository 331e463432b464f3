/* "nodewrap" and "glexec" on PATH: the launcher that this node is configured for, and Python for everything but runs. No privilege. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef NW_LIBEXEC
#error "NW_LIBEXEC, NW_GUARD and NW_PYTHON_CLI are set by the Makefile"
#endif

/* The word behind "launcher" in the guard; "setuid" when it cannot be read, so that a broken site fails closed there. */
static void configured(char *name, size_t size) {
	const char *own = getenv("NODEWRAP_GUARD");
	FILE *f = fopen(own && own[0] == '/' ? own : NW_GUARD, "re");
	char line[1100], word[64];
	snprintf(name, size, "setuid");
	while (f && fgets(line, sizeof line, f))
		if (sscanf(line, " launcher %63[a-z]", word) == 1) snprintf(name, size, "%s", word);
	if (f) fclose(f);
}

static int run_launcher(char **argv) {
	char name[64], path[sizeof NW_LIBEXEC + 80];
	configured(name, sizeof name);
	snprintf(path, sizeof path, NW_LIBEXEC "/nodewrap-%s", name);
	execv(path, argv);
	if (errno == EACCES) { /* it is executable by the callers' group alone */
		fprintf(stderr, "nodewrap: NW-CALLER: this account may not execute %s; the site puts pilots into that file's group\n", path);
		return 203;
	}
	fprintf(stderr, "nodewrap: NW-LAUNCHER: %s: %s\n", path, strerror(errno));
	return 202;
}

static int run_python(int argc, char **argv) {
	char **v = calloc((size_t)argc + 5, sizeof *v);
	if (!v) return 202;
	v[0] = (char *)NW_PYTHON_CLI;
	v[1] = (char *)"-I";
	v[2] = (char *)"-m";
	v[3] = (char *)"nodewrap";
	memcpy(v + 4, argv + 1, (size_t)argc * sizeof *v);
	execv(v[0], v);
	free(v);
	perror("nodewrap: NW-PYTHON: " NW_PYTHON_CLI);
	return 202;
}

int main(int argc, char **argv) {
	const char *slash = argc ? strrchr(argv[0], '/') : NULL, *name = slash ? slash + 1 : argc ? argv[0] : "";
	if (strcmp(name, "glexec") == 0 || (argc > 1 && strcmp(argv[1], "run") == 0)) return run_launcher(argv);
	return run_python(argc, argv);
}

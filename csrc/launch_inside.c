/* What a container's runtime executes in place of the payload's command: tells that there is a container, and becomes the command. It is the payload's,
 * without any privilege, and needs nothing of the image but /proc: it is executed by descriptor. See container.c */
#include "run.h"

int main(int argc, char **argv) {
	char said[NW_SAID] = "";
	/* What the runtime warned of belongs to the payload's stderr, which takes its place again. */
	if (argc < 2 || pread(2, said, sizeof said - 1, 0) < 0 || nwp_write_all(NW_INSIDE, said, strlen(said)) || dup2(NW_INSIDE, 2) != 2 ||
		close_range(NW_INSIDE, NW_INSIDE + 2, CLOSE_RANGE_CLOEXEC))
		return 125;
	/* Once, and before it is tried: what came later could be from a script of the image's that is still there. Such a one may have shut the socket. */
	int word = nwp_exec(argv[1], NULL, environ, true) ? errno : 0;
	if (send(NW_INSIDE + 1, &word, sizeof word, MSG_NOSIGNAL) != sizeof word) return 125;
	if (word) return nw_exec_status(word);
	nwp_exec(argv[1], argv + 1, environ, true);
	word = errno;
	return dprintf(2, "nodewrap: NW-EXEC: cannot execute in the image %s: %s\n", argv[1], strerror(word)) < 0 ? 125 : nw_exec_status(word);
}

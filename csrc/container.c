/* Containers: whether their runtime came as far as the payload's command (docs/apptainer.md). Its exit code does not tell: 255 may be anybody's. So it
 * executes launch_inside.c, which says so before it becomes the command. What it says itself until then is kept, for the error. */
#include "run.h"

/* For the payload's side of a run whose command has a runtime in front. */
int nwp_container(struct nw_run *r, struct nw_err *e) {
	int pair[2];
	if (!r->decision.image) return 0;
	r->own.path = NW_LIBEXEC "/nodewrap-inside";
	r->own.fd = nwp_open_trusted(r->own.path, nwp_trusted_owner(r), O_PATH, e);
	if (r->own.fd < 0) return -1;
	/* Nobody reads along, so it must not grow. A socket, not a pipe: what was sent nobody else can take back, through /proc/PID/fd, either. */
	r->words = memfd_create("said", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (nwp_look_at(&r->own) || r->words < 0 || ftruncate(r->words, NW_SAID - 1) ||
		fcntl(r->words, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) ||
		socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		return nw_fail(e, NW_INTERNAL, "NW-APPTAINER", "nothing to watch the container by: %s", strerror(errno));
	r->inside = pair[0]; /* and ours stays open, so that a message without bytes is not taken for the end, nor the end for a message */
	r->told = pair[1];
	return 0;
}

/* In the payload, before it becomes the runtime. 0-2 are in place, and so, above these, is what else there is. */
int nwp_hand_over(const struct nw_run *r) {
	int fd[4] = { 2, r->told, r->own.mnt, r->words };
	for (int i = 0; i < 4; i++)
		if ((fd[i] = fcntl(fd[i], F_DUPFD_CLOEXEC, NW_INSIDE + 3)) < 0) return -1;
	for (int i = 0; i < 3; i++)
		if (dup2(fd[i], NW_INSIDE + i) < 0) return -1;
	return dup2(fd[3], 2) < 0 || close_range(4, NW_INSIDE - 1, 0) || close_range(NW_INSIDE + 3, ~0u, 0) ? -1 : 0;
}

/* From "FATAL:" on, else all of it, in one line. It is the payload's word by now: nothing but text. */
static const char *last_words(const struct nw_run *r, char *said) {
	ssize_t n = pread(r->words, said, NW_SAID - 1, 0);
	said[n > 0 ? n : 0] = 0;
	char *from = strstr(said, "FATAL:");
	if (!from) from = said;
	for (char *p = from; *p; p++)
		if ((unsigned char)*p < ' ' || *p == 127) *p = ' ';
	for (size_t len = strlen(from); len && from[len - 1] == ' ';) from[--len] = 0;
	return *from ? from : "no reason given";
}

/* At the end, when nobody is left who could say more. 0: the command ran, or the run was ended before; else -1 with *e. Scripts of the image have the
 * socket too, before the command and beside it: so whatever came, in any order, says that the command began, but for one error that came alone. Each
 * command that is executed said 0 before. */
int nwp_container_end(const struct nw_run *r, struct nw_err *e) {
	char said[NW_SAID];
	int word[2] = { 0 };
	if (r->inside < 0 || r->why || !WIFEXITED(r->status)) return 0;
	ssize_t n = recv(r->inside, word, sizeof word, MSG_DONTWAIT);
	if (n < 0 && errno == EAGAIN)
		return nw_fail(e, NW_INTERNAL, "NW-APPTAINER",
			"the payload's command was not reached; %s ended with %d: %.300s; see apptainer in the policy, \"nodewrap doctor\"",
			r->decision.before[0], WEXITSTATUS(r->status), last_words(r, said));
	int err = n == sizeof *word ? word[0] : 0;
	bool alone = recv(r->inside, word, sizeof word, MSG_DONTWAIT) < 0 && errno == EAGAIN;
	if (err <= 0 || !alone || WEXITSTATUS(r->status) != nw_exec_status(err)) return 0;
	return nw_fail(e, nw_exec_status(err), "NW-EXEC", "cannot execute in the image %s: %s", r->caller.argv[r->decision.argv_from], strerror(err));
}

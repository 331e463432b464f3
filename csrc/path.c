/* Opening what root relies on: every directory on the way, and the file, belongs to root and nobody else may write it. */
#include "run.h"

#define LINKS 8

/* The userns launcher has no more rights than its caller, so what the caller owns is good enough for it. */
uid_t nwp_trusted_owner(const struct nw_run *r) {
	return r->launcher->privileged ? 0 : r->caller.uid;
}

int nwp_check_trusted(int fd, uid_t owner, const char *path, const char *part, struct stat *st, struct nw_err *e) {
	if (fstat(fd, st)) return nw_fail(e, NW_INTERNAL, "NW-PATH", "%s: cannot be examined: %s", path, strerror(errno));
	if (st->st_uid != 0 && st->st_uid != owner && !(nwp_unmapped && st->st_uid == nwp_unmapped))
		return nw_fail(e, NW_INTERNAL, "NW-PATH-OWNER", "%s: \"%s\" belongs to uid %u, not to root; chown it or move the file", path, part,
			st->st_uid);
	if (S_ISLNK(st->st_mode)) return 0; /* a link's own mode means nothing; its directory has been checked */
	if ((st->st_mode & S_IWOTH) || ((st->st_mode & S_IWGRP) && st->st_gid != 0))
		return nw_fail(e, NW_INTERNAL, "NW-PATH-WRITABLE", "%s: \"%s\" is writable by others than root; chmod go-w it", path, part);
	return 0;
}

/* Put the target of the link fd in front of what is still to walk. By itself, so that walks without links need not its 8 KiB of stack. */
static int __attribute__((noinline)) follow(int fd, char *rest, const char *path, struct nw_err *e) {
	char target[PATH_MAX], tail[PATH_MAX];
	ssize_t n = readlinkat(fd, "", target, sizeof target - 1);
	if (n < 0) return nw_fail(e, NW_INTERNAL, "NW-PATH", "%s: cannot read a link: %s", path, strerror(errno));
	target[n] = 0;
	snprintf(tail, sizeof tail, "%s", rest);
	if (snprintf(rest, PATH_MAX, "%s/%s", target, tail) >= PATH_MAX) return nw_fail(e, NW_INTERNAL, "NW-PATH", "%s: too long", path);
	return 0;
}

/* Directories that this run has walked to: a dozen files of it lie in five. They are root's all the way, so that only root could have given their
 * names another meaning since. */
static struct {
	char path[NW_PATH];
	uid_t owner;
	int fd;
} known[8];
static int knowns;

/* Where the walk begins, and what is still to walk. */
static int begin(const char *path, uid_t owner, char *rest) {
	size_t n = 0;
	int best = -1;
	for (int i = 0; i < knowns; i++) {
		size_t len = strlen(known[i].path);
		if (len <= n || known[i].owner != owner || strncmp(path, known[i].path, len) || path[len] != '/') continue;
		best = i;
		n = len;
	}
	if (path[0] != '/' || snprintf(rest, PATH_MAX, "%s", path + n) >= PATH_MAX) return -1;
	return best < 0 ? open("/", O_PATH | O_DIRECTORY | O_CLOEXEC) : fcntl(known[best].fd, F_DUPFD_CLOEXEC, 3);
}

/* dir: the last directory of path. Not remembered is only slower. */
static void remember(const char *path, uid_t owner, int dir) {
	size_t n = (size_t)(strrchr(path, '/') - path);
	if (knowns == 8 || n == 0 || n >= NW_PATH) return;
	for (int i = 0; i < knowns; i++)
		if (known[i].owner == owner && strncmp(known[i].path, path, n) == 0 && !known[i].path[n]) return;
	int fd = fcntl(dir, F_DUPFD_CLOEXEC, 3);
	if (fd < 0) return;
	memcpy(known[knowns].path, path, n);
	known[knowns].path[n] = 0;
	known[knowns].owner = owner;
	known[knowns++].fd = fd;
}

/* What was found as fd, as it is wanted. Nobody but root can put another file under this name in between: the directory has just been checked. */
static int open_last(int dir, const char *part, int fd, int flags) {
	if (flags == O_PATH) return fd; /* with O_DIRECTORY it is opened again: what shall be mounted there (autofs) is then */
	close(fd);
	return openat(dir, part, flags | O_NOFOLLOW | O_CLOEXEC);
}

int nwp_open_trusted(const char *path, uid_t owner, int flags, struct nw_err *e) {
	char rest[PATH_MAX], part[NAME_MAX + 1];
	int dir = begin(path, owner, rest), links = 0, fd;
	bool elsewhere = false; /* what path names lies in another directory than path says */
	struct stat st;
	if (dir < 0) return nw_fail(e, NW_INTERNAL, "NW-PATH", "%s: not an absolute path that can be opened", path);
	if (nwp_check_trusted(dir, owner, path, "/", &st, e)) goto fail;
	for (;;) {
		char *p = rest + strspn(rest, "/");
		size_t n = strcspn(p, "/");
		bool last = p[n + strspn(p + n, "/")] == 0;
		if (n == 0 || n > NAME_MAX || (n == 2 && p[0] == '.' && p[1] == '.')) {
			nw_fail(e, NW_INTERNAL, "NW-PATH", "%s: names no file, or leads through \"..\"", path);
			goto fail;
		}
		memcpy(part, p, n);
		part[n] = 0;
		memmove(rest, p + n, strlen(p + n) + 1);
		fd = openat(dir, part, O_PATH | O_NOFOLLOW | O_CLOEXEC);
		if (fd < 0) {
			nw_fail(e, NW_INTERNAL, "NW-PATH", "%s: \"%s\": %s", path, part, strerror(errno));
			goto fail;
		}
		if (nwp_check_trusted(fd, owner, path, part, &st, e)) {
			close(fd);
			goto fail;
		}
		if (S_ISLNK(st.st_mode)) {
			elsewhere |= last;
			char target[2];
			bool absolute = readlinkat(fd, "", target, 1) == 1 && target[0] == '/';
			int bad = ++links > LINKS ? nw_fail(e, NW_INTERNAL, "NW-PATH", "%s: too many links", path) : follow(fd, rest, path, e);
			close(fd);
			if (bad) goto fail;
			if (absolute) {
				close(dir);
				dir = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
			}
			continue;
		}
		if (last) {
			if (!elsewhere) remember(path, owner, dir);
			fd = open_last(dir, part, fd, flags);
			close(dir);
			if (fd < 0) return nw_fail(e, NW_INTERNAL, "NW-PATH", "%s: %s", path, strerror(errno));
			if (nwp_check_trusted(fd, owner, path, part, &st, e)) nwp_close(&fd);
			return fd;
		}
		close(dir);
		dir = fd;
	}
fail:
	close(dir);
	return -1;
}

char *nwp_read_trusted(const char *path, uid_t owner, size_t max, size_t *len, struct nw_err *e) {
	int fd = nwp_open_trusted(path, owner, O_RDONLY | O_NONBLOCK | O_NOCTTY, e);
	struct stat st;
	char *text;
	ssize_t n;
	if (fd < 0) return NULL;
	text = malloc(max + 2);
	if (!text || fstat(fd, &st) || !S_ISREG(st.st_mode)) {
		nw_fail(e, NW_INTERNAL, "NW-PATH", "%s: not a regular file that can be read", path);
		goto fail;
	}
	*len = 0;
	while ((n = read(fd, text + *len, max + 1 - *len)) > 0) *len += (size_t)n;
	if (n < 0 || *len > max) {
		nw_fail(e, NW_INTERNAL, "NW-PATH", "%s: %s", path, n < 0 ? strerror(errno) : "too large");
		goto fail;
	}
	close(fd);
	text[*len] = 0;
	return text;
fail:
	close(fd);
	free(text);
	return NULL;
}

/* csrc/tree.c alone, as csrc/workdir.c runs it:
 *
 *     walk TOP ORDER UID GID [WORD…]
 *
 * Becomes UID and GID, which keep what nwp_keep_chown() leaves them (ORDER chown only), walks TOP (ORDER: chown, plain, remove) and prints
 * what came of it, a name and a number in each line; paths that were left in hexadecimal. WORD: first=UID last=UID to=UID group=GID,
 * give=1 (not neutralised), since=S since_ns=NS, caps=MASK. */
#include "run.h"

static void print(const char *name, uint64_t value) {
	printf("%s %llu\n", name, (unsigned long long)value);
}

static uint64_t peak_kib(void) {
	char line[256];
	uint64_t kib = 0;
	FILE *f = fopen("/proc/self/status", "r");
	while (f && fgets(line, sizeof line, f))
		if (strncmp(line, "VmHWM:", 6) == 0) kib = strtoull(line + 6, NULL, 10);
	return kib;
}

static uint64_t now_us(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

int main(int argc, char **argv) {
	struct nw_tally t = { 0 };
	if (argc < 5) return 2;
	int dir = open(argv[1], O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	uid_t uid = (uid_t)atol(argv[3]);
	gid_t gid = (gid_t)atol(argv[4]);
	struct nw_walk w = { .top = argv[1], .chown = !strcmp(argv[2], "chown"), .remove = !strcmp(argv[2], "remove"), .first = uid, .last = uid };
	uint64_t caps = (w.chown ? 1ull << CAP_CHOWN : 0) | 1ull << CAP_LINUX_IMMUTABLE;
	w.neutralise = !w.remove, w.last_try = true;
	w.to_uid = uid, w.to_gid = gid;
	for (int i = 5; i < argc; i++) {
		const char *value = strchr(argv[i], '=');
		uint32_t n = value ? (uint32_t)strtoul(value + 1, NULL, 10) : 0;
		if (!strncmp(argv[i], "first=", 6)) w.first = n;
		else if (!strncmp(argv[i], "last=", 5)) w.last = n;
		else if (!strncmp(argv[i], "to=", 3)) w.to_uid = n;
		else if (!strncmp(argv[i], "group=", 6)) w.to_gid = n;
		else if (!strncmp(argv[i], "give=", 5)) w.neutralise = !n;
		else if (!strncmp(argv[i], "since=", 6)) w.since.tv_sec = n;
		else if (!strncmp(argv[i], "since_ns=", 9)) w.since.tv_nsec = n;
		else if (!strncmp(argv[i], "caps=", 5)) caps = n;
		else return 2;
	}
	if (dir < 0 || (geteuid() == 0 && nwp_keep_chown(uid, gid, caps))) return 3;
	uint64_t began = now_us();
	nwp_tree(dir, &w, &t);
	print("us", now_us() - began);
	print("peak_kib", peak_kib());
	print("entries", t.entries);
	print("symlinks", t.symlinks);
	print("special", t.special);
	print("suid", t.suid);
	print("foreign", t.foreign);
	print("flags", t.flags);
	print("acls", t.acls);
	print("removed", t.removed);
	print("left", t.left);
	for (int i = 0; i < 4 && t.left_path[i][0]; i++) {
		printf("path ");
		for (const char *p = t.left_path[i]; *p; p++) printf("%02x", (unsigned char)*p);
		printf("\n");
	}
	return 0;
}

/* Writes records with csrc/audit.c alone: `audit_probe LOG [set KEY=VALUE… | ACTION]…`. Prints for each action "ok" or its error.
 * Keys: swept started ended status left sync argc=N (of made-up words), fact=KEY=VALUE, on_failure=0|1|2 (enum nw_on_failure), code=NW-… (of the
 * following records, "" for none), clock=SECONDS that the wall clock is off. */
#include "run.h"

/* csrc/limits.c: what a cgroup held, which no record here has. */
void nwp_put_limits(struct nw_json *j, const struct nw_run *run) {
	(void)j, (void)run;
}

/* csrc/run.c and ids.c: without privilege nobody's ids are changed. */
void nwp_tell(const struct nw_err *e) {
	(void)e;
	abort();
}

int nwp_become(uid_t uid, gid_t gid, bool keep_groups) {
	(void)uid, (void)gid, (void)keep_groups;
	abort();
}

static struct nw_launcher launcher = { "userns", false };
static struct nw_run r;
static struct nw_err why;
static char *words[1000];
static bool durable = true;
static long off;

int __real_clock_gettime(clockid_t clock, struct timespec *t);
int __wrap_clock_gettime(clockid_t clock, struct timespec *t);
int __wrap_clock_gettime(clockid_t clock, struct timespec *t) {
	int bad = __real_clock_gettime(clock, t);
	if (clock == CLOCK_REALTIME) t->tv_sec += off;
	return bad;
}

static void set(char *key) {
	char *value = strchr(key, '=');
	*value++ = 0;
	long n = strtol(value, NULL, 10);
	if (!strcmp(key, "swept")) r.swept = n;
	else if (!strcmp(key, "started")) r.started_us = (uint64_t)n;
	else if (!strcmp(key, "ended")) r.ended = n;
	else if (!strcmp(key, "status")) r.status = (int)n;
	else if (!strcmp(key, "left")) r.left = (int)n;
	else if (!strcmp(key, "sync")) durable = n;
	else if (!strcmp(key, "clock")) off = n;
	else if (!strcmp(key, "argc")) r.caller.argc = (int)n;
	else if (!strcmp(key, "on_failure")) r.guard.audit_on_failure = (int)n;
	else if (!strcmp(key, "code")) snprintf(why.code, sizeof why.code, "%s", value);
	else if (!strcmp(key, "fact")) {
		char *rest = strchr(value, '=');
		*rest++ = 0;
		r.decision.fact[r.decision.facts++] = (struct nw_fact){ value, rest };
	} else exit(2);
}

int main(int argc, char **argv) {
	r.launcher = &launcher;
	r.caller.uid = getuid();
	r.caller.argv = words;
	r.decision.verdict = NW_PERMIT;
	r.userns = -1;
	for (size_t i = 0; i < sizeof words / sizeof *words; i++) words[i] = (char *)"word";
	snprintf(r.guard.audit, sizeof r.guard.audit, "%s", argv[1]);
	snprintf(r.run, sizeof r.run, "0199a000-0000-7000-8000-000000000000");
	for (int i = 2; i < argc; i++) {
		struct nw_err e = { 0 };
		if (!strcmp(argv[i], "set")) set(argv[++i]);
		else if (nwp_record(&r, argv[i], why.code[0] ? &why : NULL, durable, &e)) printf("%s %s\n", e.code, e.text);
		else printf("ok\n");
	}
	return 0;
}

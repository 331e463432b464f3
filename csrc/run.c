/* The whole of a run, in order; docs/architecture.md section 3 draws it. */
#include "run.h"

#ifndef NW_GUARD
#error "NW_GUARD: path of the guard file, set by the Makefile"
#endif

static struct nw_run run;

/* Once: a log that fails for the start fails for the end too. */
void nwp_tell(const struct nw_err *e) {
	static char last[700];
	char line[700];
	int n = snprintf(line, sizeof line, "nodewrap: %s: %s\n", e->code, e->text);
	if (strcmp(line, last) == 0) return;
	snprintf(last, sizeof last, "%s", line);
	nwp_write_all(2, line, (size_t)n < sizeof line ? (size_t)n : sizeof line - 1);
}

/* Step 2. Without rights beyond the caller's own, it may be pointed at the caller's own site. */
int nwp_load_guard(struct nw_run *r, struct nw_err *e) {
	size_t len;
	char *text;
	r->guard_path = NW_GUARD;
	for (char **v = r->caller.env; !r->launcher->privileged && *v; v++)
		if (strncmp(*v, "NODEWRAP_GUARD=/", 16) == 0) r->guard_path = *v + 15;
	text = nwp_read_trusted(r->guard_path, nwp_trusted_owner(r), 256 << 10, &len, e);
	if (!text) return -1;
	int bad = nw_guard_parse(text, len, &r->guard, e);
	free(text);
	struct nw_err why = *e;
	return bad ? nw_fail(e, why.exit, why.code, "%s: %.300s", r->guard_path, why.text) : 0;
}

static int read_guard(struct nw_run *r, struct nw_err *e) {
	if (nwp_load_guard(r, e)) return -1;
	if (strcmp(nw_launcher_name(&r->guard), r->launcher->name))
		return nw_fail(e, NW_INTERNAL, "NW-LAUNCHER", "this is the %s launcher, %s names \"%s\"; call that one or change the guard",
			r->launcher->name, r->guard_path, nw_launcher_name(&r->guard));
	if (!nw_in_ranges(&r->guard.caller_uid, r->caller.uid) && !(r->caller.uid == 0 && !r->launcher->privileged))
		return nw_fail(e, NW_DENIED, "NW-CALLER", "uid %u may not call nodewrap; see caller-uid in %s", r->caller.uid, r->guard_path);
	return 0;
}

static int read_profiles(struct nw_run *r, struct nw_err *e) {
	char path[NW_PATH + 16];
	snprintf(path, sizeof path, "%s/profiles", r->guard.policy);
	if (!r->profiles) r->profiles = nwp_read_trusted(path, nwp_trusted_owner(r), 256 << 10, &r->profiles_len, e);
	return r->profiles ? 0 : -1;
}

static int read_profile(struct nw_run *r, struct nw_err *e) {
	return read_profiles(r, e) ? -1 : nw_profile_parse(r->profiles, r->profiles_len, r->decision.profile, &r->profile, e);
}

/* While the policy child thinks: what is the same whatever it says. What cannot be read is told where it is needed. */
void nwp_meanwhile(struct nw_run *r) {
	struct nw_err later;
	(void)read_profiles(r, &later);
}

/* The decision names a descriptor: it must be one that the caller really gave us. */
static int check_status_fd(struct nw_run *r, struct nw_err *e) {
	int fd = r->decision.status_fd;
	if (fd < 0 || (fd > 2 && fd < NW_STATUS_FDS && r->caller.open[fd / 64] & 1ull << fd % 64)) return 0;
	r->decision.status_fd = -1;
	if (r->decision.verdict == NW_DENY) return 0; /* stays a denial, in the record too */
	return nw_fail(e, NW_USAGE, "NW-STATUS-FD", "--status-fd %d: not an open descriptor from 3 to %d", fd, NW_STATUS_FDS - 1);
}

/* Step 4. */
static int check(struct nw_run *r, struct nw_err *e) {
	return nw_decision_check(
		&r->decision, &r->guard, r->launcher->privileged, r->caller.uid, (uint64_t)r->caller.argc, (uint64_t)r->caller.envc, e);
}

/* A denial, a usage text, an error of the child's: what it says, on record. Returns the exit code, or -1 for a permit. */
static int answer(struct nw_run *r, struct nw_err *e) {
	static const int exits[] = { [NW_DENY] = NW_DENIED, [NW_MISTAKE] = NW_USAGE, [NW_ERROR] = NW_INTERNAL };
	struct nw_decision *d = &r->decision;
	struct nw_err lost;
	if (d->verdict == NW_PERMIT) return -1;
	if (d->verdict == NW_SAY) return nwp_write_all(1, d->text ? d->text : "", d->text ? strlen(d->text) : 0) ? NW_INTERNAL : d->exit;
	nw_fail(e, exits[d->verdict], d->code && d->code[0] ? d->code : "NW-DENIED", "%s", d->text ? d->text : "denied");
	if (nwp_record(r, e->exit == NW_DENIED ? "deny" : "error", e, true, &lost)) nwp_tell(&lost);
	nwp_tell(e);
	nwp_status(r, "refused", e, e->exit);
	return e->exit;
}

/* What the pilot's own process must do: its directories, its stdio. Nothing here would be to undo. */
static int prepare(struct nw_run *r, struct nw_err *e) {
	if (check(r, e) || read_profile(r, e) || nwp_open_dirs(r, e)) return -1;
	if (nwp_relay_open(r, e))
		return e->exit ? -1 : nw_fail(e, NW_INTERNAL, "NW-STDIO", "cannot arrange stdin, stdout, stderr: %s", strerror(errno));
	return nwp_split(r, e);
}

/* Step 5. The lease comes last: from then on there may be something to undo. */
static int lease(struct nw_run *r, struct nw_err *e) {
	return nwp_cgroup_path(r, e) || nwp_disk_path(r, e) || nwp_lease(r, e) || nwp_prepare_dirs(r, e) || nwp_lease_write(r, e) ||
	       nwp_disk_make(r, e);
}

/* Its owner, so that it may open /dev/stdout again. Without root the id is the pilot's, whose the terminal is. */
static int give_terminal(struct nw_run *r, struct nw_err *e) {
	if (r->tty < 0 || !r->launcher->privileged || fchown(r->tty, r->id.uid, (gid_t)-1) == 0) return 0;
	return nw_fail(e, NW_INTERNAL, "NW-STDIO", "the payload's terminal cannot be given to it: %s", strerror(errno));
}

/* Who would get the answer may have been killed while a disk kept us waiting. */
static int deserted(struct nw_run *r, struct nw_err *e) {
	bool keeper = r->role == NW_KEEPER;
	struct pollfd p = { keeper ? r->front : r->caller.parent, keeper ? 0 : POLLIN, 0 }; /* of a socket the hang-up, which is always told */
	return poll(&p, 1, 0) == 1 ? nw_fail(e, NW_INTERNAL, "NW-GONE", "who asked for it was killed before the payload was started; nothing was executed") : 0;
}

static int start(struct nw_run *r, struct nw_err *e) {
	if (lease(r, e) || give_terminal(r, e) || nwp_start(r, e) || (r->degrades && nwp_record(r, "degrade", NULL, false, e))) return -1;
	if (r->role == NW_KEEPER && nwp_let_go()) return nw_fail(e, NW_INTERNAL, "NW-KEEPER", "/dev/null: %s", strerror(errno));
	nwp_close_payload_ends(r);
	if (deserted(r, e) || nwp_lease_starting(r, e)) return -1;
	if (nwp_record(r, "start", NULL, true, e)) { /* I6: durable, or nothing is executed */
		if (strcmp(e->code, NW_UNSURE) == 0) r->started_us = nwp_realtime_us(); /* perhaps there is a start: then its end follows */
		return -1;
	}
	if (deserted(r, e)) { /* the start is on record: so will be its end */
		r->started_us = nwp_realtime_us();
		return -1;
	}
	nwp_glexec_syslog(r);
	r->start_mono_ms = nwp_now_ms();
	if (nwp_go(r, e)) return -1;
	nwp_status(r, "started", NULL, -1);
	return 0;
}

/* Step 9 in both endings: nothing alive, nothing lent, everything told. False when something could not be ended or recorded. */
bool nwp_finish(struct nw_run *r, bool started) {
	struct nw_err lost = { 0 };
	bool ok = true;
	nwp_end_processes(r);
	nwp_network_end(r);
	if (r->swept && r->left) return false; /* the next sweep comes to it: nothing has ended that a record could tell of */
	if (r->lease_fd >= 0 && r->left == 0) ok &= nwp_hand_back(r) == 0; /* not while somebody may still write there */
	if (r->started_us) ok &= nwp_record(r, "exit", NULL, false, &lost) == 0;
	if (started && r->work.fd >= 0 && r->left == 0) ok &= nwp_record(r, "handover", NULL, false, &lost) == 0;
	if (r->started_us || r->swept) ok &= nwp_record(r, "cleanup", NULL, true, &lost) == 0;
	if (lost.exit && r->role == NW_ALONE) nwp_tell(&lost);
	return ok && r->left == 0 && nwp_lease_release(r) == 0; /* else a sweep goes on with it */
}

static int exit_code(const struct nw_run *r) {
	int code = WIFEXITED(r->status) ? WEXITSTATUS(r->status) : 128 + WTERMSIG(r->status);
	return code >= NW_USAGE && code <= NW_COLLIDES ? NW_COLLIDES : code;
}

static void record_error(struct nw_run *r, const struct nw_err *e) {
	struct nw_err lost;
	if (r->guard.audit[0] && nwp_record(r, e->exit == NW_DENIED ? "deny" : "error", e, true, &lost) && strcmp(e->text, lost.text)) nwp_tell(&lost);
}

static int refuse(struct nw_run *r, const struct nw_err *e) {
	record_error(r, e);
	r->ended = false;
	nwp_status(r, "refused", e, e->exit);
	return e->exit;
}

/* Steps 5 to 9. The exit code, and *e when there is something to say to it. */
static int carry_through(struct nw_run *r, bool ready, struct nw_err *e) {
	if (!ready || start(r, e)) {
		nwp_finish(r, false);
		return refuse(r, e);
	}
	nwp_supervise(r);
	if (!r->ended && r->why) r->status = SIGKILL, r->ended = true; /* we killed it ourselves */
	bool clean = nwp_finish(r, true);
	if (!r->ended) nw_fail(e, NW_INTERNAL, "NW-INIT", "init was killed from outside; the payload's own end is not known");
	else if (!clean)
		nw_fail(e, NW_INTERNAL, "NW-CLEANUP", "processes, records or files could not be dealt with; see the cleanup record of run %s",
			r->run);
	else if (nwp_gave_up(r, e) || nwp_container_end(r, e)) record_error(r, e);
	int code = e->exit ? e->exit : exit_code(r);
	nwp_status(r, "exited", e->exit ? e : NULL, code);
	return code;
}

void nwp_init(struct nw_run *r, const struct nw_launcher *l) {
	r->launcher = l;
	r->decision.status_fd = r->decision.mode = r->work.fd = r->work.mnt = r->image.fd = r->image.mnt = r->lease_fd = r->leases = r->cgroup_fd = r->init_fd = r->payload_fd =
		-1;
	r->tty = r->range = r->keeper = r->front = r->init_sock = r->payload_sock = r->userns = r->netd = r->netns = r->id.lock = -1;
	r->words = r->inside = r->told = r->own.fd = r->own.mnt = -1;
	r->id.uid = (uid_t)-1;
	r->session = AUDIT_SID_UNSET;
	for (int i = 0; i < NW_EXPOSE; i++) r->expose[i].fd = r->expose[i].mnt = -1;
}

int nwp_main(const struct nw_launcher *l, int argc, char **argv) {
	struct nw_run *r = &run;
	struct nw_err e = { 0 };
	int code;
	nwp_init(r, l);
	if (nwp_sanitise(r, argc, argv, &e) || read_guard(r, &e) || nwp_ask(r, &e) || check_status_fd(r, &e)) {
		code = refuse(r, &e);
		nwp_tell(&e);
		return code;
	}
	if ((code = answer(r, &e)) >= 0) return code;
	nwp_close_callers(&r->caller, r->decision.status_fd);
	bool ready = prepare(r, &e) == 0;
	if (r->role == NW_FRONT) {
		nwp_forget_files(r);
		nwp_close_payload_ends(r);
		nwp_as_pilot(r, true);
		nwp_supervise(r);
		nwp_as_pilot(r, false);
		code = nwp_front_end(r, &e) ? e.exit : r->code;
	} else code = carry_through(r, ready, &e);
	if (r->role == NW_KEEPER) {
		nwp_keeper_tell(r, code, &e);
		return code;
	}
	if (r->stdio.exit && !e.exit) e = r->stdio, code = e.exit;
	if (e.exit) nwp_tell(&e);
	return code;
}

/* Linked into a launcher with -Wl,--wrap=clock_gettime: a wall clock that is set by STEP seconds each time that somebody looks. */
#include <time.h>

int __real_clock_gettime(clockid_t clock, struct timespec *t);
int __wrap_clock_gettime(clockid_t clock, struct timespec *t);
int __wrap_clock_gettime(clockid_t clock, struct timespec *t) {
	static int looks;
	int bad = __real_clock_gettime(clock, t);
	if (clock == CLOCK_REALTIME) t->tv_sec += ++looks * (STEP);
	return bad;
}

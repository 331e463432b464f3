/* Loading a finished seccomp program into the calling thread, for good. */
#ifndef NW_LOCK_H
#define NW_LOCK_H

#include <stddef.h>

/* cffi: begin */
/* no_new_privs, then the filter (seccomp(2)); program is an array of struct sock_filter. 0, or -1 with errno. */
int nw_lock(const void *program, size_t len);
/* cffi: end */

#endif

/* The walk of tree.c, as harm.c sees it, which deals with what is met on it. */
#ifndef NW_TREE_H
#define NW_TREE_H

#include "run.h"

#define SHARED 8 /* levels at the top that two workers may share */

struct level {
	int fd; /* -1: closed for those below */
	dev_t dev;
	ino_t ino;
	off_t next;  /* where to go on */
	size_t name; /* where its name begins in walk.path */
	int pass;    /* 0: all but directories; 1: into directories; 2, when removing: the directories themselves */
	bool dirs;   /* there are any */
	bool stays;  /* something that has been told of keeps it from being removed */
};

struct walk {
	const struct nw_walk *want;
	struct nw_tally *tally;
	int root;
	struct level *stack;
	size_t depth, room, hold; /* hold: levels at the top that stay open */
	bool counts;              /* offsets in directories count entries, in an order that changes */
	char *path;               /* of the present directory below the top, with a "/" behind each name */
	size_t used, space;
	bool blind; /* the kernel cannot be asked where links lead */
	/* two workers */
	pid_t other;            /* the second one */
	unsigned me;            /* which of them this is */
	struct nw_tally *half;  /* the second one's */
	size_t shared, chained; /* levels of which each does half, while both are in them; */
	int chain[SHARED];      /* their directories and the names of those, for the end */
	char chain_name[SHARED][NAME_MAX + 1];
};

bool nwp_tree_owns(const struct walk *w, const struct stat *st);
bool nwp_tree_old(const struct walk *w, const struct stat *st);
int nwp_tree_look(int dir, const char *name, struct stat *st);
int nwp_tree_open(struct walk *w, int dir, const char *name, struct stat *st);
void nwp_tree_left(struct walk *w, const char *name);
void nwp_tree_give(struct walk *w, int fd, const char *name, const struct stat *st);
void nwp_tree_disarm(struct walk *w, int fd, const char *name, const struct stat *st);
void nwp_tree_file(struct walk *w, int dir, const char *name);
void nwp_tree_take(struct walk *w, int dir, const char *name, int how);
void nwp_tree_gone(struct walk *w, int dir, const char *name, int how);

#endif

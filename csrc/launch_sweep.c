/* For administrators, epilogues and timers; no privilege of its own. */
#include "run.h"

int main(int argc, char **argv) {
	return nwp_sweep_main(argc, argv);
}

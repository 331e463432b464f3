/* The setuid-root launcher: mode 4750 root:nodewrap-callers. */
#include "run.h"

int main(int argc, char **argv) {
	static const struct nw_launcher setuid_root = { "setuid", true };
	return nwp_main(&setuid_root, argc, argv);
}

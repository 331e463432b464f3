/* The launcher without privilege: unprivileged user namespaces, newuidmap ranges where the site delegates them. */
#include "run.h"

int main(int argc, char **argv) {
	static const struct nw_launcher userns = { "userns", false };
	nwp_unprivileged();
	return nwp_main(&userns, argc, argv);
}

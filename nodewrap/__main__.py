"""``python3 -m nodewrap``: everything but ``run``, which is the launcher's."""

import sys

from nodewrap.cli import main

if __name__ == "__main__":
    if sys.argv[1:2] == ["doctor"]:
        from nodewrap.commands import doctor

        doctor.bare()
    sys.exit(main(sys.argv[1:]))

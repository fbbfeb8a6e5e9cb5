"""`python -m leapalign` is the command `leapalign`."""

import sys

from leapalign.commands.main import main

if __name__ == "__main__":
    sys.exit(main())

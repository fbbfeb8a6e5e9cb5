"""`python -m leapalign` is the command `leapalign`."""

import sys

from leapalign.cli import main

if __name__ == "__main__":
    sys.exit(main())

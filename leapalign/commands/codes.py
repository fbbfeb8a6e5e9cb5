"""The exit codes of `leapalign`."""

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 3

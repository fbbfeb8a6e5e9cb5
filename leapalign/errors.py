"""The one error that is the user's to mend."""


class UsageError(ValueError):
    """A mistake in the settings or the input, told in one line.

    The line names the key, its value, the limit and the way out; the command line prints it after
    ``leapalign: error:`` and ends with exit code 2, without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

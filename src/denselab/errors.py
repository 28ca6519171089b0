"""The one error a user can cause."""


class InputError(ValueError):
    """An argument, a file or a model that DenseLab cannot use.

    Its text names what was given, what was wanted, and how to mend it; the command line prints it without a
    traceback and ends with exit code 2.
    """

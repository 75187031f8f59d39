"""Expected failures: one line each, naming the cause and the remedy."""


class PairmillError(Exception):
    """A build failed for a reason a user can act on; `exit_code` is the process's status."""

    exit_code = 1


class ConfigError(PairmillError):
    """The configuration is wrong; nothing was done."""

    exit_code = 2


class Refused(PairmillError):
    """A quality gate refused to publish."""

    exit_code = 3

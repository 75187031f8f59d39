"""Expected failures: one line each, naming the cause and the remedy."""

from collections.abc import Sequence


class PairmillError(Exception):
    """A build failed for a reason a user can act on; `exit_code` is the process's status."""

    exit_code = 1


class ConfigError(PairmillError):
    """The configuration is wrong; nothing was done."""

    exit_code = 2


class Refused(PairmillError):
    """A quality gate refused to publish: the reasons, and where the report of the build lies."""

    exit_code = 3

    def __init__(self, message: str, reasons: Sequence[str] = (), report: str = ""):
        super().__init__(message)
        self.reasons, self.report = tuple(reasons), report

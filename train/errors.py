"""Errors that the command line shows as one line."""


class RunError(Exception):
    """Something the user can put right: a message that names what was expected and what came."""


class DivergedError(RunError):
    """A run that the guard ended.

    Attributes:
      step: the last one computed.
    """

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step

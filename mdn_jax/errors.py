"""Errors that the command line shows as one line."""


class RunError(Exception):
    """Something the user can put right: a message that names what was expected and what came."""


class NoModelError(RunError):
    """A directory that holds no model."""

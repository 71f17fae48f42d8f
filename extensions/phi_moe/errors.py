"""The one kind of error that is the user's to mend: settings or a checkpoint that do not fit."""


class MoEError(ValueError):
    """A mistake in a model's settings or a checkpoint of another layout, told in one line."""

    for_users = True
    """A program that shows users' mistakes without a traceback knows them by this mark."""

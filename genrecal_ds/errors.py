"""Defines UserError, a mistake that the user can mend. Imports nothing: every room may use it."""


class UserError(Exception):
    """A mistake in a recipe, a folder or a shard; the message is one line: file, key, fix.

    Commands print it to stderr without a traceback and exit with code 2.
    """

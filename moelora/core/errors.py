"""Errors that users can act on. Each says where, what was found, what was expected and what to do.

The command line prints them without a traceback and exits with 2.
"""


class MoeloraError(ValueError):
    """Base of all errors that moelora raises about its input. told: whether another process of the run says it."""

    told = False


class ConfigError(MoeloraError):
    """A recipe, an adapter configuration or a method's options are wrong."""


class TargetError(ConfigError):
    """A target matches nothing, or matches a layer that cannot carry experts."""


class DataError(MoeloraError):
    """A dataset cannot be read, recognised or converted."""


class AdapterError(MoeloraError):
    """A saved adapter is damaged, or does not fit the model it is loaded into."""


class OutputError(MoeloraError):
    """A result cannot be written where it was asked for."""

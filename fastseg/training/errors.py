"""What can go wrong in a run that is the user's to mend; each message is one line."""


class ConfigError(ValueError):
    """A setting of a run that can't be used: the message names it, what it must be and what it is."""


class CheckpointError(ValueError):
    """A file that is no checkpoint of fastseg, or not the one that is needed here."""


class DivergedError(RuntimeError):
    """A run whose loss or weights are no longer finite."""

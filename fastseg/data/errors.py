"""The one error that everything about the user's data raises."""


class DataError(ValueError):
    """A problem with the user's data: one line that names the file or folder and the offending value."""

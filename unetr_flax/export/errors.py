"""The error of models that cannot be exported."""


class ExportError(ValueError):
    """A model that cannot be exported as asked, or a place for it; the message is one line."""

"""`vpmoe evaluate`."""


def evaluate() -> None:
    """Placeholder."""

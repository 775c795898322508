"""`vpmoe report`."""


def report() -> None:
    """Placeholder."""

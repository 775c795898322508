"""`vpmoe score`."""


def score() -> None:
    """Placeholder."""

"""`vpmoe chat`."""


def chat() -> None:
    """Placeholder."""

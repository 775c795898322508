"""`vpmoe demo`."""


def demo() -> None:
    """Placeholder."""

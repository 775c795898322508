"""`vpmoe export`."""


def export() -> None:
    """Placeholder."""

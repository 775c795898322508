"""A student samples its own completions."""

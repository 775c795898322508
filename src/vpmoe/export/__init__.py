"""A student as a transformers checkpoint."""

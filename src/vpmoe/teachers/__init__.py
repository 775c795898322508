"""Tokens in, scores out."""

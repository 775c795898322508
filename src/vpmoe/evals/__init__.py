"""What a student can do: held-out loss, format, exact match, and the report of it."""

"""What a student is worth: losses on held-out text, form and correctness of what it writes."""

"""The plans: each stage is a sentence built from the rooms below."""

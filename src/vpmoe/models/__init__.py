"""The student: what it is made of, its first weights, its forward pass and its size."""

"""What is minimised: sums and counts for each span."""

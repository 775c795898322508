"""The student: one decoder, configured."""

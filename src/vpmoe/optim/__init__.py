"""NorMuon for matrices, AdamW for the rest."""

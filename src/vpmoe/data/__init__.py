"""SYNTH rows to Harmony conversations to packed batches."""

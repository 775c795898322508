"""What lies on disk: shards, manifests, checkpoints, run directories."""

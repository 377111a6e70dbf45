"""What a run leaves on disk and how it is read back: config, checkpoints, metrics, and the model they belong to."""

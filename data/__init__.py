"""From a corpus to batches: shards, sampling, degradation, cached latents. Knows no model."""

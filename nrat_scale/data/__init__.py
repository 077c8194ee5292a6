"""From verified shards to the batches of a training step."""

"""From verified shards to the batches of a training step, in the order in which a sample passes through:

index          positions, source ids and offsets, from index.json
shards         opened, verified, read at random positions
split, source  held-out and excluded samples; the labels that training sees
plan           (index, seed, step) -> the samples of the global batch
batches        those samples -> this rank's uint8 batch, out of memory maps or of `resident` images
prefetch       threads that compute batches and fetch remote shards ahead
augment        crop, flip, CutMix, floats in [0, 1], on the device
training_data  all of these for one recipe
"""

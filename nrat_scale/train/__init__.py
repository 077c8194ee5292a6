"""Training: `accelerate launch -m nrat_scale.train RECIPE [key=value ...]`."""

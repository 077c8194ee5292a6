"""The paper's tables and figures, and the benchmark of training under label noise: `python -m nrat_scale.reproduce WHAT`."""

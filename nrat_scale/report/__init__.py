"""Reports: `python -m nrat_scale.report RUN [RUN ...]`."""

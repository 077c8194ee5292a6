"""Checkpoints: atomic, verified before use, never unpickled.

    RUN/checkpoints/step-00000980/         model, ema, optimizer, objective .safetensors (those that are not empty),
                                           state.json, and manifest.json: name -> bytes, sha256 of every other file
    RUN/checkpoints/best.json, last.json   {"step", "epoch", "folder"}; "selected": false before any validation

`state` says what a state.json must hold, `format` writes and verifies one folder, `folder` manages the checkpoints of a run,
`saver` does all of it in a thread.
"""

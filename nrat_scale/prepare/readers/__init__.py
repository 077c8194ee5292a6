"""One reader per input format: files in, `LabelledArrays` out."""

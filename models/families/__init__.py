"""The model families, one file each with a table `MODELS`: name -> builder. What several of
them share stands in `layers` (transformers) and `conv_layers` (convolutions)."""

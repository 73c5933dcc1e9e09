"""Studies that need models and machines together: ViTCoD's published figures beside ours,
processors beside machines, variants of a network for a sweep, and what predicts run time."""

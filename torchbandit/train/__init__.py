"""The standalone training loop: options, parts, the loop itself, checkpoints and reports."""

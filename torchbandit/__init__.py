"""A bandit environment for RL fine-tuning of language models."""

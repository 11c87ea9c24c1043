"""`torchbandit score`: prompt/response pairs of a file to rewards, log-probs and KL."""

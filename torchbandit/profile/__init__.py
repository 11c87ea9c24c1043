"""`torchbandit profile`: what a reward model and a reference lose, and save, in each precision."""

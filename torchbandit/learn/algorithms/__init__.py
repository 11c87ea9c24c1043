"""The algorithms, each beside its paper.

ppo.py        PPO with a critic
reinforce.py  REINFORCE++ and its baseline variant, RLOO, ReMax
groups.py     the GRPO family: GRPO, Dr. GRPO, DAPO, GSPO, CISPO
raft.py       best-of-n and expert iteration
"""

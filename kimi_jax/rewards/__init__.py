"""Rewards: what a response is worth, given its verdict and those of the other responses to the same problem."""

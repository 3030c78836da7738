"""What happens around a policy update: which problems to try, rollouts, the replay buffer, the batch they become."""

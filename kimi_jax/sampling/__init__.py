"""Sampling: from logits to tokens, jitted prefill and decode, and the host loop that turns prompts into rollouts."""

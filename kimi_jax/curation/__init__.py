"""Making training sets: which prompts are worth learning from, and tests for problems that have none."""

"""From long chains of thought to short answers of the same worth (k1.5 §2.4): merging, rejection sampling, DPO."""

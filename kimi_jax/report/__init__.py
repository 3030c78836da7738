"""What a run has to show: learning curves, a table of SFT against RL, and an HTML page with both and sampled rollouts.

metrics   rows of `metrics.jsonl`: "step" or "iteration", and numbers (None where there was nothing to measure)
summary   {"seconds", "device", "seed", "sft": {kind: scores}, "rl": {kind: scores}}; kind is "text" or "image",
          scores are {"accuracy", "greedy_accuracy", "mean_tokens", "ungradable", "n"}, shares in 0..1
groups    {stage: [RolloutGroup, ...]}, stages in the order in which they are shown, e.g. {"SFT": ..., "RL": ...}
"""

from kimi_jax.report.curves import write_curves
from kimi_jax.report.page import write_report
from kimi_jax.report.table import results_table

__all__ = ["results_table", "write_curves", "write_report"]

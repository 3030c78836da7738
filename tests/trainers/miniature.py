"""The whole job in seconds on one core: a config file for scripts/train.py, and for tests that run the job themselves.

It learns next to nothing. The length reward gives even wrong answers different rewards, so that every update moves.
"""

import functools

from kimi_jax.models import config as models
from kimi_jax.trainers.config import default_config

SIZE = models.ModelConfig(
    vocab_size=1,  # the tokenizer decides
    width=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=12,
    mlp_width=40,
    rope_base=100.0,
    tie_embeddings=True,
    vision=models.VisionConfig(patch_size=4, merge_size=2, width=8, num_layers=1, num_heads=2, mlp_width=12),
)


def prepare(monkeypatch) -> None:
    """For a job within the process of a test: on one device, without pictures; forgets the size afterwards."""
    import jax

    from kimi_jax.report import curves
    from kimi_jax.training import sharding

    monkeypatch.setattr(curves, "png", lambda figure, **options: b"")  # would take a third of the time
    monkeypatch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    monkeypatch.setitem(models.NAMED_SIZES, "miniature", SIZE)


def get_config():
    models.NAMED_SIZES["miniature"] = SIZE
    config = default_config()
    changes = {
        "model": {"size": "miniature", "remat": False},
        "data": {"text_tasks": ("chain",), "image_tasks": ("pips",), "train_per_kind": 29, "heldout_per_kind": 11},
        "sft": {"steps": 12, "rows": 16, "micro_rows": 8, "eval_every": 3, "eval_problems": 5},
        "rl": {"iterations": 10, "problems": 6, "responses": 4, "updates": 2, "micro_rows": 8},
        "rows": {"tokens": 64, "patches": 64, "logits_chunk": 64},
        "sampling": {"rows": 16, "prompt_tokens": 31, "prompt_patches": 16, "max_tokens": 23, "chunk": 8},
        "eval": {"report_groups": 2},
    }
    config.update(changes)
    config.update_from_flattened_dict(
        {
            "sft.examples_per_kind": 29,
            "sft.checkpoint_every": 4,  # between two evaluations
            "sft.optimizer.schedule": "constant",
            "sft.optimizer.peak": 1e-2,
            "sft.optimizer.warmup_steps": 1,
            "rl.checkpoint_every": 2,
            "rl.permute_advantages": True,  # one more use of randomness to resume,
            "rl.reset_optimizer": False,  # and one more state
            "rewards.weights.length": 1.0,
            "rewards.length_warmup": 0,
            "rl.optimizer.peak": 1e-2,
            "rl.optimizer.warmup_steps": 1,
        }
    )
    return config

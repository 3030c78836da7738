"""A classic reward model on two CPU cores: one number for a response, above 0 if its answer is equal to the reference.

    python scripts/train.py --config=configs/rm_classic.py --workdir=runs/rm_classic

The data, size and number of updates of configs/rm_cot.py, beside which it ran in 16 minutes on two x86 cores. Held-out
accuracy 61.6% of 1,000 judgements, half of which are right: so small a model, in so few updates, learns to see the form
of an answer rather than its value.
"""

from kimi_jax.trainers.config import default_config


def get_config():
    config = default_config()
    with config.unlocked():
        config.reward_model.kind = "classic"
        config.model.scalar_head = True
        config.model.remat = False
        config.model.unroll = 4

        config.data.text_tasks = ("equivalence",)
        config.data.image_tasks = ()
        config.data.train_per_kind = 32_000
        config.data.heldout_per_kind = 1_000

        config.rows.tokens = 192
        config.rows.patches = 0
        config.rows.logits_chunk = 192

        config.sft.examples_per_kind = 32_000
        config.sft.steps = 2_400
        config.sft.rows = 6
        config.sft.micro_rows = 6
        config.sft.eval_every = 400
        config.sft.checkpoint_every = 400
        config.sft.optimizer.end = 2e-4

        config.sampling.rows = 256
        config.sampling.prompt_tokens = 64
        config.sampling.prompt_patches = 0
        config.sampling.max_tokens = 32
        config.sampling.prefill_tokens = 512
    return config.lock()

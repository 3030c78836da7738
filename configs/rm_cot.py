"""A chain-of-thought reward model on two CPU cores: does a response have an answer that is equal to the reference?

python scripts/train.py --config=configs/rm_cot.py --workdir=runs/rm_cot

Two x86 cores, shared with the run of configs/rm_classic.py and other work: 17 minutes (10 of one core). Held-out
accuracy 95.1% of 1,000 judgements: no mistake on correct responses and on wrong numbers, one on wrong spellings, and
71% right on wrong expressions (9*3-4).
"""

from kimi_jax.trainers.config import default_config


def get_config():
    config = default_config()
    with config.unlocked():
        config.reward_model.kind = "chain_of_thought"
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

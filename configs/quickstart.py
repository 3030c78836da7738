"""The main job, sized for two CPU cores: a 1M-parameter multimodal model learns arithmetic in text and in pictures.

    bash scripts/quickstart.sh
    python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart

Two x86 cores: 8 to 10 min. Pass@1 on held-out problems, mean of three seeds: text 52.4% -> 81.8%, image 60.7% ->
88.8% (commit f88b935). SFT stops far from its plateau, because two cores have no time for one.
"""

from kimi_jax.trainers.config import default_config


def get_config():
    config = default_config()
    with config.unlocked():
        config.model.remat = False  # memory is no concern at this size
        config.model.unroll = 4

        config.data.text_tasks = ("chain",)
        config.data.image_tasks = ("text_image", "pips")
        config.data.train_per_kind = 8_000

        config.rows.tokens = 128
        config.rows.patches = 64
        config.rows.logits_chunk = 128

        config.sft.steps = 600
        config.sft.rows = 8  # many small steps: at this stage the gradient is clear and the model far from its goal
        config.sft.micro_rows = 8
        config.sft.eval_every = 200
        config.sft.checkpoint_every = 200
        config.sft.optimizer.end = 1e-3

        # An update of RL sees 192 responses: below about a hundred the gradient is mostly noise (docs/log.md).
        config.rl.iterations = 40
        config.rl.problems = 96
        config.rl.responses = 8
        config.rl.updates = 4
        config.rl.micro_rows = 8
        config.rl.tau = 0.1
        config.rl.optimizer.schedule = "cosine"
        config.rl.optimizer.peak = 7e-5
        config.rl.optimizer.end = 1e-5
        config.rl.optimizer.b2 = 0.99
        config.rl.optimizer.warmup_steps = 4
        # The report resets it. With 4 updates per iteration a fresh Adam takes steps of full size in every direction;
        # moments that live on damp the noisy ones, which allows three times the rate (docs/log.md).
        config.rl.reset_optimizer = False
        config.rl.checkpoint_every = 4

        config.sampling.rows = 256
        config.sampling.prompt_tokens = 32
        config.sampling.prompt_patches = 64
        config.sampling.max_tokens = 40
        config.sampling.prefill_tokens = 256  # few: most calls read the prompts of the few slots that became free
    return config.lock()

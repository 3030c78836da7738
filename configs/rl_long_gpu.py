"""Responses of 131,072 tokens on one GPU of 80 GB: partial rollouts at the length of the report (k1.5 §2.6.2).

    python scripts/train.py --config=configs/rl_long_gpu.py --workdir=runs/rl_long_gpu
    python scripts/train.py --config=configs/rl_long_gpu.py --dry_run

One H200 (commit aa9f449): 7 minutes, 33 GiB at most. Rollout phases of 52, 66, 98 and 148 s with 4, 8, 12 and 16 rows
in flight; in the last one 10 s to read 786,000 saved tokens again; then 42 s for the update. The run shows that the
length fits and what it costs, in memory and in seconds; nothing is learned. The model has the shape of Qwen2.5-0.5B
(but the small vocabulary of the task) and random weights, drawn from at a temperature at which they fall into loops, so
that most responses run to their cut. Their rewards are equal, so their gradients are zero; dividing logits by so low a
temperature also magnifies `logprob_gap`.

An iteration begins 4 responses and lets every open one grow by 32,768 tokens; so 4, 8, 12 and then 16 are in flight,
and from the fourth iteration on 4 are complete and trained on, one packed row each. The same command after Ctrl-C
resumes after the last whole iteration.
"""

from kimi_jax.trainers.config import default_config


def get_config():
    config = default_config()
    with config.unlocked():
        config.model.size = "qwen2.5-0.5b"  # bfloat16 compute, float32 masters

        config.tokenizer.vocab_size = 151_936  # the size's own; a tokenizer trained on the task text stays below it
        config.data.text_tasks = ("chain",)
        config.data.image_tasks = ()
        config.data.train_per_kind = 64
        config.data.heldout_per_kind = 0  # every evaluation would write responses of full length

        config.rows.tokens = 132_096  # prompt and response
        config.rows.patches = 0
        config.rows.logits_chunk = 3_072

        # None: what SFT would teach first is to end.
        config.sft.examples_per_kind = 64
        config.sft.steps = 0
        config.sft.rows = 2
        config.sft.micro_rows = 1
        config.sft.eval_problems = 0

        config.rl.iterations = 4
        config.rl.problems = 1
        config.rl.responses = 4
        config.rl.updates = 1
        config.rl.micro_rows = 1
        config.rl.segment_tokens = 32_768
        config.rl.temperature = 0.02
        config.rl.checkpoint_every = 1
        config.rewards.deadline_s = 60.0

        config.sampling.rows = 16
        config.sampling.prompt_tokens = 1_024
        config.sampling.prompt_patches = 0
        config.sampling.max_tokens = 131_072
        config.sampling.chunk = 128
        config.sampling.page = 64
        config.sampling.prefill_tokens = 8_192
    return config.lock()

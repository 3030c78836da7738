"""One peer of bench.py, in this process alone: `python _bench_peers.py NAME REQUEST`, both from bench.py.

REQUEST is JSON: shape, seed, rows, repeats, and prompt and new for what samples (every row writes `new` tokens at
temperature 1), tokens and micro_rows for what trains. Weights are random, prompts are token ids (no tokenizer is
fetched). Prints one JSON line last.
"""

import dataclasses
import json
import statistics
import sys
import time

import numpy as np

from kimi_jax.models.config import ModelConfig, named_size


def measure_tunix(shape: ModelConfig, request: dict) -> dict:
    """Tunix's own sampler on its Qwen2, log-probs included, as RL needs them."""
    import importlib.metadata

    import jax
    from _bench_probes import Clock, probes, random_matrices
    from flax import nnx
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.qwen2 import model as qwen2

    from kimi_jax.training.metrics import peak_memory

    rows, prompt, new = request["rows"], request["prompt"], request["new"]
    measured, clock = probes(), Clock()
    config = qwen2.ModelConfig(
        num_layers=shape.num_layers,
        vocab_size=shape.vocab_size,
        embed_dim=shape.width,
        hidden_dim=shape.mlp_width,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        num_kv_heads=shape.num_kv_heads,
        rope_theta=int(shape.rope_base),
        norm_eps=shape.norm_eps,
        use_tied_embedding=shape.tie_embeddings,
        dtype=shape.dtype,
        param_dtype=shape.dtype,
    )
    with jax.set_mesh(jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)):
        graph, state = nnx.split(nnx.jit(lambda: qwen2.Qwen2(config, rngs=nnx.Rngs(0)))())
        # Its MLPs start at zero, and products of zeros draw less power than real ones.
        model = nnx.merge(graph, random_matrices(state, request["seed"]))
        cache = CacheConfig(prompt + new, shape.num_layers, shape.num_kv_heads, shape.head_dim)
        sampler = Sampler(model, _Numbers(), cache)

        def run():
            output = sampler(
                [" ".join(map(str, row)) for row in _prompts(shape, request)],
                max_generation_steps=new,
                max_prompt_length=prompt,
                temperature=1.0,
                top_p=1.0,
                seed=request["seed"],
                eos_tokens=[shape.vocab_size],  # never drawn
                return_logprobs=True,
            )
            assert [len(tokens) for tokens in output.tokens] == [new] * rows
            return output.tokens

        _, seconds = clock.steady(run, repeats=request["repeats"])
    return {
        "version": importlib.metadata.version("google-tunix"),
        **_rates(request, seconds),
        "peak_memory_bytes": peak_memory(),
        "compilations": clock.compilations,
        "compile_seconds": clock.seconds,
        "probes": measured,
    }


class _Numbers:
    """A tokenizer whose text is token ids."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids) -> str:
        return ""

    def dedup_bos_ids(self, ids: list[int]) -> list[int]:
        return ids

    def bos_id(self) -> int:
        return 0  # none is put in front

    def eos_id(self) -> int:
        return 0

    def pad_id(self) -> int:
        return 0


def measure_transformers(shape: ModelConfig, request: dict, *, static: bool) -> dict:
    """Hugging Face `generate`: a cache that grows, or one of fixed size whose decode step transformers compiles."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = _torch_probes(torch, device)
    model = _torch_model(shape, request["seed"], request["prompt"] + request["new"], device).eval()
    ids = torch.tensor(_prompts(shape, request), device=device)
    options = {"cache_implementation": "static"} if static else {}

    def run():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request["new"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            **options,
        )
        assert output.shape[1] == request["prompt"] + request["new"]
        return output.cpu()

    with torch.inference_mode():
        start = time.perf_counter()
        run()
        if static:
            run()  # the second run may still record what the first compiled
        first = time.perf_counter() - start
        seconds = statistics.median(_seconds(run) for _ in range(request["repeats"]))
    return {
        "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
        **_rates(request, seconds),
        "seconds_until_steady": first,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "probes": measured,
    }


def measure_transformers_training(shape: ModelConfig, request: dict) -> dict:
    """A plain training loop: one update of all rows, micro-batch by micro-batch."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = _torch_probes(torch, device)
    rows, tokens, micro = request["rows"], request["tokens"], request["micro_rows"]
    model = _torch_model(shape, request["seed"], tokens, device).train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=device == "cuda")
    ids = torch.tensor(_prompts(shape, request | {"prompt": tokens}), device=device)

    def run():
        for part in ids.split(micro):
            (model(input_ids=part, labels=part, use_cache=False).loss * (len(part) / rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    run(), run()
    seconds = statistics.median(_seconds(run) for _ in range(request["repeats"]))
    return {
        "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "tokens_per_second": rows * tokens / seconds,
        "ms_per_step": 1e3 * seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "probes": {"before": before, "after": _torch_probes(torch, device)},
    }


def _torch_model(shape: ModelConfig, seed: int, max_tokens: int, device: str):
    """Qwen2 of this shape with random weights in its compute dtype."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=max_tokens,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=shape.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        dtype=shape.dtype,
    )
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype))


def _torch_probes(torch, device: str) -> dict[str, float]:
    """The same as `_bench_probes.probes`, by torch."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    size, side, span = (2**28, 8192, 3.0) if device == "cuda" else (2**25, 512, 0.1)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    square = torch.randn(side, side, dtype=torch.bfloat16, device=device)

    def median(run):
        taken, end = [], time.perf_counter() + span
        while len(taken) < 2 or time.perf_counter() < end:
            taken.append(_seconds(lambda: ([run() for _ in range(10)], wait())) / 10)
        return statistics.median(taken[1:])

    return {
        "copy_tb_s": 2 * size / median(lambda: target.copy_(source)) / 1e12,
        "matmul_tflop_s": 2 * side**3 / median(lambda: square @ square) / 1e12,
        "matmul_side": side,
    }


def _prompts(shape: ModelConfig, request: dict) -> list[list[int]]:
    draw = np.random.default_rng(request["seed"])
    return draw.integers(1, shape.vocab_size, (request["rows"], request["prompt"])).tolist()  # 0 is padding to Tunix


def _rates(request: dict, seconds: float) -> dict:
    return {
        "tokens_per_second": request["rows"] * request["new"] / seconds,
        "ms_per_step": 1e3 * seconds / request["new"],  # prefill included
        "seconds": seconds,
    }


def _seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(name: str, request: dict) -> None:
    shape = dataclasses.replace(named_size(request["shape"]), vision=None)
    if name == "tunix":
        result = measure_tunix(shape, request)
    elif name == "hf":
        result = measure_transformers_training(shape, request)
    else:
        result = measure_transformers(shape, request, static=name == "hf-static")
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))

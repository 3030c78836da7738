"""Packaging. The bounds span what the tests run on, requirements/py311.txt to requirements/py312.txt, and no more."""

from setuptools import find_packages, setup

setup(
    name="kimi_jax",
    version="0.1.0",
    description="Reinforcement learning of multimodal language models with long chains of thought, in one JAX program",
    license="Apache-2.0",
    packages=find_packages(include=["kimi_jax", "kimi_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.5.1,<3",
        "array_record>=0.8.6,<0.9",
        "flax>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "jax>=0.10.2,<0.12",
        "jinja2>=3.1.6,<4",
        "math-verify>=0.9,<0.10",
        "matplotlib>=3.11.2,<3.12",
        "ml_collections>=1.1,<2",
        "numpy>=2.4.6,<2.6",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow>=13,<14",
        "sentencepiece>=0.2.3,<0.3",
        "tensorflow-datasets>=4.9.10,<5",
        "tokenizers>=0.23.3,<0.24",
        "tqdm>=4.70,<5",
    ],
    extras_require={
        "curation": ["cyaron>=0.7,<0.8", "datasketch>=2,<3"],  # making problem sets: test cases, near-duplicates
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        # What tests compare published models with; not needed to run anything.
        "oracles": ["protobuf", "safetensors", "tiktoken", "torch", "transformers>=5.23,<6", "trl>=1.16,<2"],
        "test": ["ipykernel", "mypy", "nbclient", "nbformat", "pytest", "pytest-xdist", "ruff"],
    },
)

"""kimi_jax: Kimi k1.5, reimplemented in JAX. `types.py` has the nouns, `trainers/` the two loops."""

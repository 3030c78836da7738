"""Losses: pure functions of arrays that return `(loss, parts)` and know nothing of models, meshes or configs.

A loss carries its own normalization (a weight per response or per batch), so the losses and gradients of micro-batches
add up to those of the whole batch. So do the `parts`, scalars for the metrics: sums and counts, never means. Those with
a name that starts with `max_` are the exception: they combine by the maximum.
"""

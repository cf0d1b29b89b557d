"""Tensor parallelism as in the paper (section 6): sharding of model, pool and adapters, and the collectives."""

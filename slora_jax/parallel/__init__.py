"""Tensor parallelism as in the paper (section 6): how the model, the pool and the adapters are cut, and what the shards
send each other."""

"""Training throughput and memory beside PEFT and beside padded stacks of adapters."""

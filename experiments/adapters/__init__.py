"""Small adapters for SmolLM2-135M-Instruct: training data and scores."""

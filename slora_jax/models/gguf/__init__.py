"""GGUF files, the format of llama.cpp: header, model config, tensors and tokenizer."""

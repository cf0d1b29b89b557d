"""GGUF files, as llama.cpp writes them: header, model config, tensors and tokenizer, each in a module of its own."""

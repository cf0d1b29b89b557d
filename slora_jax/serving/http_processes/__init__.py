"""HTTP in processes of its own: the engine's process has the device, the others parse, tokenize and stream."""

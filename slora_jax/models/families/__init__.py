"""The supported architectures, one file each: how its `config.json` is read, and the names of its tensors."""

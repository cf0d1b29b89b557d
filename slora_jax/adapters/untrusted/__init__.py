"""Guards against hostile files: files that may block, headers that lie, patterns that never end, endless values."""

"""Guards against hostile files: blocking opens, false headers, unbounded regular expressions and values."""

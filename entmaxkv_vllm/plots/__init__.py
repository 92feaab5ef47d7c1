"""`entmaxkv plot`: pictures of result files."""

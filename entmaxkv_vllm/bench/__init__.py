"""`entmaxkv bench` and what the scripts that measure share with it."""

"""`entmaxkv evaluate`: what a model loses under selectors and budgets."""

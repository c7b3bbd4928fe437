"""What the four projects have in common: the tokenizer (which also finds the model) and sampling."""

"""The tokenizer and sampling that the four projects share."""

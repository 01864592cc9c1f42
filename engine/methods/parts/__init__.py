"""What methods are made of and share: collapse and its remedies, corruption, mixing, relations, tokenizers."""

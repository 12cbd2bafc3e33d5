"""Native encodings into the vocabulary, one file a family of rules."""

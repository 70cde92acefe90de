"""Pretraining: from a corpus to a BERT with its vocabulary, without padding on the way."""

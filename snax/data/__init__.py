"""Audio files, corpora, codes files and token shards. Independent of the model."""

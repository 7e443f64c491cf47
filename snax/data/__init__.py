"""Audio files, corpora, codes files and token shards. Nothing here knows the model."""

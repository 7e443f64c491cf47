"""A corpus of audio becomes shards of tokens: `snax extract`.

`corpus` plans which clips form which shard, `reading` gets at them, `decoding` makes audio of them, `run` codes of the
audio, `table` rows of the codes, and `store` keeps them.
"""

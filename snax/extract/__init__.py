"""Extraction of token shards from a corpus of audio: `snax extract`.

`snax.data.corpus` plans which clips form which shard, `snax.data.reading` opens the clips and `snax.data.decoding`
decodes them. `run` encodes the audio, `table` converts the codes to Parquet, and `store` commits the shards.
"""

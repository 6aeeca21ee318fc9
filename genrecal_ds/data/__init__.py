"""The data room: webdataset shards + index -> plan of the order -> samples -> PairBatch.

index.py   what is in a folder of shards: one fixed-size record per sample, checked at start-up
plan.py    which samples form which step: a pure function of (classes, seed, epoch, global_batch)
decode.py  bytes of one tar member -> checked record or image; the builder uses the same functions
pair.py    one sample -> two tokenisations; batch.py  pairs -> PairBatch; loader.py  all in order
reader.py  sample number -> Sample, by byte range, crc-checked, parsed by webdataset
"""

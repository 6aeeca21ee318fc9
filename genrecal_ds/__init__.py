"""Distils a large VLM into a small one that shares neither tokenizer nor architecture.

The data's path:

    sources --data_tools--> shards + index --plan--> PairBatch
      PairBatch --> teacher body (frozen, ZeRO-3) --+
      PairBatch --> student body (ZeRO-3) ----------+--> token_align --> Recalibrator --> head_loss
                          +--> student head CE              frozen teacher head ------------^
    launch/train.py RECIPE --> Trainer(stage) --> Engines --> checkpoints --> export --> evaluate

Shape suffixes used in tensor code:

    B batch            T teacher length     S student length
    H teacher width    D student width      V vocabulary
    A teacher rows used (answers, then in stage 1 questions)
    P packed rows of the Recalibrator       N loss rows
"""

__version__ = "0.1.0"
IGNORE = -100  # the label of a row that teaches nothing, as in torch's cross_entropy

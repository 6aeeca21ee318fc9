"""A model family that transformers does not know; lies in its folder, as remote code does."""

import os

from transformers import PreTrainedConfig

if os.environ.get("GENRECAL_TEST_MARKER"):  # tells the test whether this file was ever run
    open(os.environ["GENRECAL_TEST_MARKER"], "a").close()


class LookerConfig(PreTrainedConfig):
    model_type = "looker"

    def __init__(
        self, vocab_size=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, patch_size=8, image_token_id=0, **rest
    ):  # fmt: skip
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads, self.intermediate_size = num_key_value_heads, intermediate_size
        self.patch_size, self.image_token_id = patch_size, image_token_id
        super().__init__(**rest)

    def get_text_config(self, **_):
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size, pad_token_id=None,
        )  # fmt: skip

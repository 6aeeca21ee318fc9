"""Patches through one linear layer, in place of the image tokens of a Llama."""

import torch
from torch import nn
from transformers import GenerationMixin, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_looker import LookerConfig


class LookerPreTrainedModel(PreTrainedModel):
    config_class = LookerConfig
    base_model_prefix = "model"
    _supports_sdpa = True


class LookerModel(LookerPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.eye = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.bridge = nn.Linear(config.hidden_size, config.hidden_size)
        self.language_model = LlamaModel(config.get_text_config())
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def get_decoder(self):
        return self.language_model

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, **rest):
        embeds = self.language_model.embed_tokens(input_ids)
        if pixel_values is not None:
            size = self.config.patch_size
            patches = pixel_values.unfold(2, size, size).unfold(3, size, size)
            patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
            seen = self.bridge(self.eye(patches).tanh())
            mask = (input_ids == self.config.image_token_id).unsqueeze(-1)
            embeds = embeds.masked_scatter(mask.expand_as(embeds), seen.to(embeds.dtype))
        out = self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, **rest)
        return BaseModelOutputWithPast(out.last_hidden_state, out.past_key_values)


class LookerForCausalLM(LookerPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = LookerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.lm_head

    def get_decoder(self):
        return self.model.language_model

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, **rest):
        out = self.model(input_ids, attention_mask, pixel_values, **rest)
        logits = self.lm_head(out.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)

    def prepare_inputs_for_generation(self, input_ids, pixel_values=None, **rest):
        inputs = super().prepare_inputs_for_generation(input_ids, **rest)
        if inputs["input_ids"].shape[1] == input_ids.shape[1]:  # the first step sees the picture
            inputs["pixel_values"] = pixel_values
        return inputs

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.1)

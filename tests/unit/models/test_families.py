"""Every family with facts: body, head, components, and pictures of single samples in a batch."""

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

from genrecal_ds.data.batch import collate
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.errors import UserError
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.loading import load_full
from genrecal_ds.models.processors import build_processor, load_processor
from genrecal_ds.models.vlm import VLM, component_of

pytestmark = pytest.mark.unit


def idefics3(student, out):
    """A tiny Idefics3 folder on the demo student's tokenizer, with 2 x 2 tiles and a global one."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    names = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    names += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    tokenizer.add_special_tokens({"extra_special_tokens": names})
    end = tokenizer.convert_tokens_to_ids("<end>")
    config = AutoConfig.for_model(
        "idefics3",
        text_config={
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": len(tokenizer), "pad_token_id": end,
        },
        vision_config={
            "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2,
        pad_token_id=end, tie_word_embeddings=False,
    )  # fmt: skip
    images = {
        "size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32},
        "do_image_splitting": True,
    }  # fmt: skip
    template = (student / "chat_template.jinja").read_text().replace("<image_context>", "<image>")
    processor = build_processor(
        "idefics3", tokenizer, images, image_seq_len=4, chat_template=template
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=end)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def folders(pair, tmp_path_factory):
    return {
        "qwen2_vl": pair / "teacher_init",
        "internvl": pair / "student_init",
        "idefics3": idefics3(pair / "student_init", tmp_path_factory.mktemp("idefics") / "model"),
    }


def chat(text, image):
    parts = [{"type": "image"}] * image + [{"type": "text", "text": text}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "7"}]}
    return [{"role": "user", "content": parts}, answer]


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl", "idefics3"])
def test_batch_equals_single_samples_through_the_full_model(folders, family):
    """Wide, square and no picture in one batch: our body and head against the family's own."""
    folder = folders[family]
    encoders = PairEncoders(ChatEncoder(folder, 500))
    samples = [(chat("what digit is this ?", 1), [Image.new("RGB", (64, 32), (9, 99, 200))]),
               (chat("where ?", 1), [Image.new("RGB", (32, 32), (250, 9, 9))]),
               (chat("what is 3 plus 4 ?", 0), [])]  # fmt: skip
    pairs = [pair for sample in samples for pair in encoders.encode(*sample)]
    batch = collate(pairs, encoders.placeholder(), encoders.vision_rules, False).student
    vlm = VLM.from_config(folder, torch.float32).eval()
    load_full(vlm.model, folder)
    full = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = vlm.body(*batch.inputs)
        logits = vlm.head(hidden.flatten(0, 1)[batch.rows_M])
        expected = []
        for pair in pairs:
            view = pair.student
            per_token = {key: value[None] for key, value in view.per_token.items()}
            out = full(input_ids=view.input_ids_T[None], **view.vision, **per_token).logits[0]
            expected += [out[start - 1 : end - 1] for start, end in view.answers]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl", "idefics3"])
def test_every_parameter_has_a_component(folders, family):
    vlm = VLM.from_config(folders[family], torch.float32)
    found = {component for _, _, component in vlm.components()}
    assert found >= {"vision", "projector", "embeddings", "layers", "norm"}
    assert ("head" in found) != vlm.is_tied


def test_a_tied_model_trains_both_or_none(folders):
    vlm = VLM.from_config(folders["internvl"], torch.float32)
    assert vlm.is_tied
    with pytest.raises(UserError, match="embeddings alone, but the student's head is tied"):
        vlm.train_only(("embeddings",))
    vlm.train_only(("embeddings", "head"))
    assert vlm.head.weight.requires_grad


def test_processor_survives_saving(folders, tmp_path):
    for family, folder in folders.items():
        processor = load_processor(folder)
        processor.save_pretrained(tmp_path / family)
        (tmp_path / family / "config.json").write_bytes((folder / "config.json").read_bytes())
        again = load_processor(tmp_path / family)
        image = Image.new("RGB", (40, 30), (1, 2, 3))
        prompt = processor.apply_chat_template(chat("x", 1), tokenize=False)
        first, second = (
            p(text=[prompt], images=[image], return_tensors="pt") for p in (processor, again)
        )
        assert torch.equal(first["input_ids"], second["input_ids"])
        assert torch.equal(first["pixel_values"], second["pixel_values"])


def test_unknown_families_and_parameters_are_refused(pair, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip-2"}')
    with pytest.raises(UserError, match="blip-2 has no adapter; known: .*internvl"):
        VLM.from_config(tmp_path, torch.float32)
    with pytest.raises(UserError, match="no prefix in models/families.py"):
        component_of("model.audio.weight", {"model.visual.": "vision"})

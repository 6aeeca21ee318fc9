"""The doctor on tiny folders: a good recipe shows every part, each fault is one line and exit 2."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from genrecal_ds import doctor
from genrecal_ds.analysis.samples import histogram, marked
from genrecal_ds.console.refusals import Findings
from genrecal_ds.doctor import main
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.recalibrator import save_recalibrator
from tests.fixtures import write_recipe
from tests.zoo.remote import build_looker

pytestmark = pytest.mark.unit

STAGES = [{"kind": kind, "steps": 3} for kind in ("align", "distill", "sft")]


@pytest.fixture
def recipe(pair, shards, tmp_path):
    return write_recipe(
        tmp_path / "recipe.yaml",
        run_dir=str(tmp_path / "run"),
        teacher={"path": str(pair / "teacher_init"), "max_length": 128},
        student={"path": str(pair / "student_init"), "max_length": 128},
        data={"train": str(shards / "train"), "validation": str(shards / "validation")},
        batch={"global_batch": 32, "micro_batch": 16},
        stages=STAGES,
    )


@pytest.fixture
def examine(recipe, capsys):
    """(exit code, output, the refusals at its end) of the recipe with these arguments."""

    def run(*arguments: object) -> tuple[int, str, list[str]]:
        code = main([str(recipe), *map(str, arguments)])
        output = capsys.readouterr().out
        return code, output, output.rstrip().split("\nRefusals\n")[-1].splitlines()

    return run


@pytest.fixture
def student(pair, tmp_path):
    """A copy of the student's folder, to be damaged."""
    return shutil.copytree(pair / "student_init", tmp_path / "student")


def test_a_good_recipe(examine, tmp_path):
    code, output, _ = examine()
    assert (code, output.rstrip().splitlines()[-1]) == (0, "No refusals"), output
    for shown in (
        "family qwen2_vl, class Qwen2VLForConditionalGeneration",
        "184,976 parameters, head and embeddings tied",
        "behind the head: scale 1, softcap none",
        "pixels from pil",
        "weights: every one of 67 tensors is there, in its shape; F32 in the files",
        "samples packed, attention ours, within each sample",
        "student: LlamaTokenizer, fast BPE",
        "recalibrator: packed qwen2 blocks, attention sdpa",
        "440 tokens, ids up to 439; 440 embedding rows",
        "end of turn <|im_end|> (id 2)",
        "end of turn <end> (id 9)",
        "contents as parts, answers as parts",
        "<|vision_start|><image x 4><|vision_end|>what",
        "student: <s><user><image><image x 20></image>what",
        "20 to 20 visual tokens, median 20, in",
        "not measured: data.lengths is estimated",
        "-- max_length 128 --",
        "stage distill (distill)\n",
        "no GPU here: assumed 1 GPU of 80 GiB (assumed)",
        "stage sft: 2 micro-batches a step on each GPU",
        "AdamW states",
        "/train: 200 samples, ",
        "/validation: 24 samples, ",
    ):
        assert shown in output
    assert not (tmp_path / "run").exists() and "\x1b" not in output


def test_answers_are_marked_and_nothing_else(examine, shards):
    from genrecal_ds.data.index import ShardIndex
    from genrecal_ds.data.reader import ShardReader

    reader = ShardReader(ShardIndex.load(shards / "train"))
    _, output, _ = examine()
    lines = output.splitlines()
    for number in range(0, 200, 10):
        sample = reader.read(number)
        at = lines.index(f"sample {number}, key {sample.key}")
        texts = [m["content"][0]["text"] for m in sample.messages if m["role"] == "assistant"]
        for line, end in ((lines[at + 1], "<|im_end|>"), (lines[at + 2], "<end>")):
            marked = [part.split("]]")[0] for part in line.split("[[")[1:]]
            assert [text.strip() for text in marked] == [text + end for text in texts]
        # the row that predicts an answer's first token is the last one of its question
        assert lines[at + 1].count("<|im_start|>assistant((\\n))[[") == len(texts)
        assert lines[at + 2].count("<end>((<bot>))[[") == len(texts)


def test_what_max_length_leaves_out(examine):
    code, output, refusals = examine("student.max_length=40")
    assert code == 0 and "left out: " in output and ": longer than max_length" in output
    code, _, refusals = examine("student.max_length=40", "data.too_long=error")
    assert code == 2 and all(
        line.startswith("data.too_long: error, and sample") for line in refusals
    )
    code, _, refusals = examine("student.max_length=8")
    assert code == 2
    assert refusals == ["data.train: none of 20 samples can be used: longer than max_length"]


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def without_answers(folder):
    (folder / "chat_template.jinja").write_text("the same for every chat")


def smaller_vocabulary(folder):
    edit_config(folder, lambda config: config["text_config"].update(vocab_size=439))


def without_vision(folder):
    state = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in state.items() if "vision" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def broken_template(folder):
    (folder / "chat_template.jinja").write_text("{% for x in %}")


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (
            without_tokenizer,
            "no file of a vocabulary that Qwen2Tokenizer reads; copy",
        ),
        (without_answers, "no chat can be taught by its chat template"),
        (smaller_vocabulary, "has token ids up to 439, config.json's vocab_size is 439; take both"),
        (without_vision, "no weights for model.vision_tower"),
        (pickled, "pytorch_model.bin is a pickle, which can run code; save"),
        (without_config, "no config.json; name a Hugging Face model folder"),
        (broken_config, "take all its files from one release"),
        (broken_template, "Expected an expression"),
        (cut_weights, "file not fully covered; take all its files from one release"),
    ],
)
def test_a_damaged_folder(examine, student, damage, line):
    damage(student)
    code, output, refusals = examine(f"student.path={student}")
    assert code == 2
    assert any(r.startswith("student.path: ") and line in r for r in refusals), refusals
    assert "family qwen2_vl" in output and "/train: 200 samples" in output  # it went on


def test_code_of_a_folder_is_refused_and_not_run(examine, tmp_path, monkeypatch):
    monkeypatch.setenv("GENRECAL_TEST_MARKER", str(tmp_path / "ran"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = build_looker(tmp_path / "looker")
    code, _, refusals = examine(f"student.path={folder}")
    assert code == 2 and len(refusals) == 1
    assert "looker runs Python code of its own folder; take a release" in refusals[0]
    listed = "student.allow_remote_code={files: {}, components: {}}"
    code, _, refusals = examine(f"student.path={folder}", listed)
    assert code == 2 and len(refusals) == 1 and "the recipe says not listed" in refusals[0]
    assert not (tmp_path / "ran").exists()


def test_missing_shards(examine, tmp_path):
    code, output, refusals = examine(f"data.train={tmp_path / 'none'}")
    assert code == 2 and len(refusals) == 1
    assert refusals[0].startswith("data.train: ") and "no such folder" in refusals[0]
    assert "skipped: needs data.train" in output and "stage align (align)" in output
    code, _, refusals = examine("data.lengths=measured")
    assert code == 2 and len(refusals) == 1
    assert refusals[0].startswith("data.lengths: ") and "data_tools.tokens" in refusals[0]


def test_a_world_that_does_not_divide(examine):
    code, _, refusals = examine("--gpus", 3)
    assert code == 2 and len(refusals) == 3
    assert refusals[0].startswith("stage align: batch.global_batch 32 is not a multiple of")


def test_hostfiles(examine, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=1\nb slots=1\n")
    code, output, _ = examine("--hostfile", hosts)
    assert code == 0 and "2 hosts, 2 GPUs of 80 GiB" in output
    hosts.write_text("-oProxyCommand=x slots=1\n")
    code, _, refusals = examine("--hostfile", hosts)
    assert code == 2 and f"{hosts}:1: " in refusals[0]
    assert examine("--hostfile", hosts, "--gpus", 2)[0] == 2


def test_what_does_not_fit(examine):
    code, _, refusals = examine("--gpu-memory", 1)
    assert code == 2
    assert refusals[0].startswith("stages.align: a gpu needs 2.")
    assert "of 1.0 GiB; largest: CUDA and NCCL" in refusals[0]


def test_stages_that_cannot_start(examine):
    code, _, refusals = examine("stages.align.train=[layers]")
    assert code == 2 and "stages.0: train: align trains the Recalibrator only" in refusals[0]
    code, _, refusals = examine("stages.sft.student=/none")
    assert code == 2
    assert any(r.startswith("stages.sft.student: /none: no config.json") for r in refusals)


def test_folders_that_a_stage_names(examine, pair, tmp_path):
    result = tmp_path / "recalibrator"
    save_recalibrator({"norm.weight": torch.ones(3)}, result, {})
    code, _, refusals = examine(
        f"stages.distill.recalibrator={result}",
        f"stages.sft.student={pair / 'teacher_init'}",
        f"stages.align.student={pair / 'student_init'}",
    )
    assert code == 2 and len(refusals) == 2
    assert refusals[0].startswith("stages.distill.recalibrator: ")
    assert "was trained for another pair or depth" in refusals[0]
    assert refusals[1].startswith("stages.sft.student: ")
    assert "is of another architecture than student.path" in refusals[1]


def test_measured_lengths(examine, pair, shards, tmp_path):
    from data_tools.tokens import count, write
    from genrecal_ds.data.index import ShardIndex

    folder = shutil.copytree(shards / "validation", tmp_path / "measured")
    sides = ("teacher", "student")
    encoders = {side: ChatEncoder(pair / f"{side}_init", 1 << 30) for side in sides}
    index = ShardIndex.load(folder)
    table, _ = count(index, encoders, 0)
    write(index, {side: encoder.digest for side, encoder in encoders.items()}, table)
    code, output, _ = examine(f"data.train={folder}", "data.lengths=measured")
    shown = output.split("Lengths of all samples\n")[1]
    assert code == 0 and f"{folder}: 24 samples\nteacher: 4 to 4 visual tokens" in shown
    bars = shown.split("student: ")[1].splitlines()[1:9]
    assert sum(int(bar.split()[-1]) for bar in bars) == 24


def test_a_defect_of_ours_is_no_refusal():
    with pytest.raises(KeyError), Findings(Console()).attempt("stages.align"):
        {}["x"]


def test_a_recipe_that_is_none(examine, tmp_path):
    assert examine("no_such_key=1")[0] == 2
    assert main([str(tmp_path / "none.yaml")]) == 2


def test_adapters(examine):
    pytest.importorskip("peft")
    code, output, _ = examine("student.lora={rank: 4}")
    # rank (inputs + outputs) of seven matrices in each of two blocks: widths 64, 32 and 192
    trained = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 192))
    assert code == 0 and f"{98_816 + trained:,} parameters  {trained:,} train: adapters" in output


def test_green_on_a_terminal(examine, monkeypatch):
    terminal = partial(Console, color_system="standard", force_terminal=True)
    monkeypatch.setattr(doctor, "Console", terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, output, _ = examine()
    assert "\x1b[33m<bot>\x1b[0m\x1b[32m" in output and "[[" not in output


def test_text_of_data_cannot_steer_the_terminal(pair):
    encoder = ChatEncoder(pair / "teacher_init", 128)
    text = [{"type": "text", "text": "a\x1b[2J\u202e"}]
    messages = [{"role": role, "content": text} for role in ("user", "assistant")]
    shown = marked(encoder.encode(messages, []), encoder, in_colour=False).plain
    assert "[[a\\x1b[2J\\u202e<|im_end|>]]" in shown and shown.isprintable()


def test_the_mark_of_max_length():
    bars = list(histogram(np.array([1, 13, 100, 101]), 100))
    assert [bar.split() for bar in bars[:2]] == [
        ["1", "to", "13", "#" * 40, "2"], ["14", "to", "26", "0"],
    ]  # fmt: skip
    assert bars[7].split()[:3] == ["92", "to", "100"] and bars[8].split()[:2] == [
        "--",
        "max_length",
    ]
    assert bars[9].split() == ["above", "100", "#" * 20, "1"]

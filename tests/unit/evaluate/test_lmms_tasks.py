"""Shards as lmms-eval's task: the files, and what the functions in them give of a sample.

Scores beside lmms-eval's own functions run where it is installed; docs/evaluation.md says where.
"""

import random

import pyarrow.parquet
import pytest
import yaml

from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.evaluate.lmms_tasks import (
    main,
    score_of,
    to_messages,
    to_target,
    to_text,
    with_scores,
)
from genrecal_ds.evaluate.metrics import METRICS, metric_of

pytestmark = pytest.mark.unit


class Loader(yaml.SafeLoader):
    pass


Loader.add_constructor("!function", lambda loader, node: node.value)


def test_a_task_holds_every_sample_as_it_is(tmp_path, shards, capsys):
    folder = shards / "validation"
    assert main([str(folder), str(tmp_path), "--name", "toy", "--max-new-tokens", "7"]) == 0
    task = yaml.load((tmp_path / "genrecal_toy.yaml").read_text(), Loader)
    assert task["task"] == "genrecal_toy" and task["generation_kwargs"]["max_new_tokens"] == 7
    namespace: dict = {}
    exec((tmp_path / "genrecal_tasks.py").read_text(), namespace)
    named = [value for key, value in task.items() if key.startswith("doc_to")]
    named.append(task["process_results"])
    assert all(callable(namespace[name.removeprefix("genrecal_tasks.")]) for name in named)

    docs = pyarrow.parquet.read_table(task["dataset_kwargs"]["data_files"]["test"]).to_pylist()
    reader = ShardReader(ShardIndex.load(folder))
    assert len(docs) == len(reader)
    for number, doc in enumerate(docs):
        sample, images = reader.read(number), []
        messages = to_messages(doc)
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    images.append(part.pop("url"))
        assert messages == sample.messages[:-1]
        assert [i.tobytes() for i in images] == [i.tobytes() for i in sample.images]
        assert to_text(doc) in str(sample.messages[-2]) and to_target(doc) == sample.answers[0]
        assert with_scores(doc, [sample.answers[0]]) == {"score": 1.0}
        assert with_scores(doc, ["nothing of it"]) == {"score": 0.0}


def test_refusals(tmp_path, shards, capsys):
    assert main([str(shards / "validation"), str(tmp_path), "--name", "a b"]) == 2
    assert "--name a b: letters, digits and _ only" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), str(tmp_path), "--name", "a"]) == 2


@pytest.mark.parametrize("kind", ["vqav2", "chartqa", "docvqa"])
def test_our_scores_are_those_of_lmms_eval(kind):
    pytest.importorskip("lmms_eval")
    generator = random.Random(0)
    texts = [
        "yes",
        "Yes",
        "two",
        "2",
        "2.0",
        "20%",
        "a dog",
        "the dog.",
        "",
        "1,000",
        "1000",
        "dog's",
    ]
    ours = METRICS[metric_of(kind)]
    for _ in range(1000):
        count = 10 if kind == "vqav2" else generator.randint(1, 3)
        answers = [generator.choice([t for t in texts if t]) for _ in range(count)]
        prediction = generator.choice(texts)
        expected = score_of(kind, prediction, answers)
        assert float(ours(prediction, answers)) == pytest.approx(expected), (prediction, answers)

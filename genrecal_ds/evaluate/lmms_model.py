"""Offers an exported student to lmms-eval, for any task: `--model genrecal_export`.

Imported by lmms-eval alone, through the entry point `lmms_eval.models` (setup.py).
"""

from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from genrecal_ds.data.reader import Sample
from genrecal_ds.evaluate.generate import Generator


class Export(lmms):
    """Answers greedily with a folder's own chat template, as genrecal_ds.evaluate does."""

    is_simple = False  # takes turns with pictures in their places

    def __init__(self, pretrained: str, batch_size: int | str = 1, **_: Any) -> None:
        super().__init__()
        self.folder, self.batch_size = Path(pretrained), int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer all requests, in the order given, with the token limit of the first request."""
        if not requests:
            return []
        generator = Generator(self.folder, requests[0].args[2].get("max_new_tokens", 32))
        samples = [self._sample(request) for request in requests]
        return [text for batch in generator.answers(samples, self.batch_size) for text in batch]

    def _sample(self, request: Instance) -> Sample:
        _, to_messages, _, number, task, split = request.args
        images, messages = [], []
        for message in to_messages(self.task_dict[task][split][number]):
            parts = []
            for part in message["content"]:
                if part["type"] == "image":
                    images.append(part["url"])
                    parts.append({"type": "image"})
                else:
                    parts.append(part)
            messages.append({"role": message["role"], "content": parts})
        answer = {"role": "assistant", "content": [{"type": "text", "text": ""}]}
        return Sample(f"{task}/{number}", images, [*messages, answer], task, [], "")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("genrecal_export: answers only; take a task that generates")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("genrecal_export: one round; take a task that asks once")


MANIFEST = ModelManifest(
    "genrecal_export", chat_class_path="genrecal_ds.evaluate.lmms_model.Export"
)

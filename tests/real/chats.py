"""Chats for released models, and their encoders, which take seconds to build."""

from functools import cache
from pathlib import Path

from genrecal_ds.models.chat import ChatEncoder

MODELS = ("smollm2_135m", "gemma3_270m")
QUESTION = 'def median(values):\n    """Return the middle value."""\n'
TURNS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    (QUESTION, "ordered = sorted(values)\nreturn ordered[len(ordered) // 2]"),
]


@cache
def encoder(folder: Path) -> ChatEncoder:
    return ChatEncoder(folder, 4000)


def message(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


def conversations(*turns):
    return [[message("user", asked), message("assistant", said)] for asked, said in turns]

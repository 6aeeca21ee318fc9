"""Secrets do not reach what is printed or written; what only looks like one does."""

import io

import pytest

from genrecal_ds.console.redact import REDACTED, _RedactingStream, redact, redact_tree

pytestmark = pytest.mark.unit

SECRETS = {
    "hugging face": "hf_" + "Ab3" * 10,
    "openai": "sk-proj-" + "x9Y" * 9,
    "aws": "AKIA" + "ABCDEFGHIJKLMNOP",
    "github": "ghp_" + "q" * 30,
    "password in a url": "hunter2secret",
    "assigned": "abcDEF123456",
}
TEXTS = {
    "hugging face": "logging in with {} now",
    "openai": '{{"key": "{}"}}',
    "aws": "id={};region=eu",
    "github": "https://{}@github.com/x",
    "password in a url": "s3://bob:{}@store/bucket",
    "assigned": "WANDB_API_KEY={} python train.py",
}


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_go(name):
    text = TEXTS[name].format(SECRETS[name])
    assert SECRETS[name] not in redact(text) and REDACTED in redact(text)
    assert SECRETS[name] not in str(redact_tree({"a": [{"b": text}]}))


@pytest.mark.parametrize(
    "text",
    [
        "tokens: 1234567", "tokens_per_second: 12345678", "student.max_tokens=12345678",
        "image_token: <image>", "s3://bucket/shards/train", "task-token alignment of rows",
        "https://host:8080/path@x",
    ],
)  # fmt: skip
def test_the_rest_stays(text):
    assert redact(text) == text


def test_keys_that_name_a_secret():
    tree = {"hf_token": "short", "password": "x", "tokens": ["bos"], "steps": 3, "wandb": None}
    assert redact_tree(tree) == {
        "hf_token": REDACTED, "password": REDACTED, "tokens": ["bos"], "steps": 3, "wandb": None,
    }  # fmt: skip


def test_a_secret_in_two_writes():
    out = io.StringIO()
    stream = _RedactingStream(out)
    secret = SECRETS["hugging face"]
    stream.write("using " + secret[:10])
    stream.write(secret[10:] + "\nnext")
    stream.flush()
    assert out.getvalue() == f"using {REDACTED}\nnext"

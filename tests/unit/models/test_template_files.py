"""Where releases keep their chat template, and whose template wins."""

import json

import pytest

from genrecal_ds.errors import UserError
from genrecal_ds.models.template_files import read_template, with_fixed_date

pytestmark = pytest.mark.unit


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


IN_TOKENIZER = {"tokenizer_config_DOT_json": {"chat_template": "tokenizer's"}}
IN_PROCESSOR = {"chat_template_DOT_json": {"chat_template": "processor's"}}
NAMED = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config_DOT_json": {"eos_token": "x"}}, None),
        (IN_TOKENIZER, "tokenizer's"),
        (IN_PROCESSOR, "processor's"),
        (IN_TOKENIZER | IN_PROCESSOR, "processor's"),
        ({"processor_config_DOT_json": {"chat_template": "p"}} | IN_TOKENIZER, "p"),
        (IN_TOKENIZER | IN_PROCESSOR | {"chat_template_DOT_jinja": "file's"}, "file's"),
        ({"tokenizer_config_DOT_json": {"chat_template": NAMED}}, "d"),
        ({"chat_template_DOT_json": {"chat_template": {"default": "d", "rag": "r"}}}, "d"),
        (IN_TOKENIZER | {"additional_chat_templates__rag_DOT_jinja": "r"}, "tokenizer's"),
    ],
)
def test_the_template_of_a_folder(tmp_path, files, expected):
    assert read_template(write(tmp_path, **files)) == expected


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config_DOT_json": {"chat_template": NAMED[:1]}},
        {"additional_chat_templates__tool_use_DOT_jinja": "t"},
    ],
)
def test_named_templates_without_a_default_are_a_choice_of_the_users(tmp_path, files):
    with pytest.raises(UserError, match="named tool_use and none is the default; copy one"):
        read_template(write(tmp_path, **files))


def test_a_template_without_a_date_is_left_as_it_is():
    assert with_fixed_date("{{ messages }}") == ("{{ messages }}", {})
    source = "{{ strftime_now(\"%Y\") }}{{ strftime_now( '%d %B' ) }}"
    assert with_fixed_date(source)[1] == {"%Y": "2024", "%d %B": "26 July"}

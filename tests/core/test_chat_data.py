"""Rows are checked with the line and the field named; rendering agrees with transformers token for
token."""

import json
import shutil

import pytest
from tiny_model import make_tiny_model, write_rows

from workshop_utils.core.chat_data import read_rows, render, render_prompt
from workshop_utils.core.chat_template import ChatTokenizer
from workshop_utils.core.errors import DataError

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": ' Zoë says:\n"{x}" <b> '},
    {"role": "assistant", "content": "ok"},
]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_renders_and_encodes_like_transformers(tokenizer_dir):
    from transformers import AutoTokenizer

    reference, ours = AutoTokenizer.from_pretrained(tokenizer_dir), ChatTokenizer(tokenizer_dir)
    for turns, opening in ((CONVERSATION[:2], True), (CONVERSATION, False)):
        text, how = ours.render(turns, opening), {"add_generation_prompt": opening}
        assert text == reference.apply_chat_template(turns, tokenize=False, **how)
        assert ours.encode(text) == reference.apply_chat_template(turns, **how)


def test_prompt_ends_where_the_answer_begins(tokenizer_dir):
    tokenizer = ChatTokenizer(tokenizer_dir)
    prompt = render_prompt(tokenizer, CONVERSATION)
    assert tokenizer.render(CONVERSATION, False).startswith(prompt + "ok<|im_end|>")


def test_rows_are_rendered_and_written_without_an_old_index(tokenizer_dir, tmp_path):
    """NeMo would take the index beside the file for that of the new rows."""
    tokenizer, target = ChatTokenizer(tokenizer_dir), tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.idx.npy").write_bytes(b"old")
    rendered = render(write_rows(tmp_path / "rows.jsonl", 12), tokenizer, target)
    assert rendered.rows == 12 and not target.exists()
    rendered.write()
    line = json.loads(target.read_text().splitlines()[3])
    turn = {"role": "user", "content": "number 3?"}
    assert line == {"input": tokenizer.render([turn]), "output": "it is 3"}
    assert target.read_bytes() == rendered.content
    assert not (tmp_path / "out.jsonl.idx.npy").exists()


def test_input_and_output_become_messages(tmp_path):
    # A line separator inside a text does not end the row.
    (tmp_path / "rows.jsonl").write_text('{"input": "a\u2028c", "output": "b"}\n\n')
    asked, answer = read_rows(tmp_path / "rows.jsonl")[0]["messages"]
    assert asked == {"role": "user", "content": "a\u2028c"}
    assert answer == {"role": "assistant", "content": "b"}


def turns(*pairs):
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in pairs]})


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: a list"),
        ('{"prompt": "x"}', "no answer among its columns: it has prompt. Known are"),
        ('{"messages": []}', "at least a user and an assistant"),
        (turns(("bot", "x"), ("assistant", "y")), "messages[0]"),
        (turns(("user", 3), ("assistant", "y")), "`content` that is a text"),
        (turns(("user", "x"), ("user", "y")), "assistant's answer"),
        ('{"input": "x", "output": " "}', "not empty"),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, said):
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "output": "b"}\n' + line + "\n")
    with pytest.raises(DataError, match="rows.jsonl, line 2") as caught:
        read_rows(tmp_path / "rows.jsonl")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "content, said", [(None, "does not exist"), (b"", "holds no rows"), (b"\xff\xfe", "not UTF-8")]
)
def test_a_bad_file_is_named(tmp_path, content, said):
    if content is not None:
        (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_rows(tmp_path / "rows.jsonl")


def test_a_tokenizer_without_a_template_is_refused(tokenizer_dir, tmp_path):
    (tmp_path / "tokenizer.json").write_text((tokenizer_dir / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="no chat template"):
        ChatTokenizer(tmp_path)
    with pytest.raises(DataError, match="has no tokenizer_config.json"):
        ChatTokenizer(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "file, content, said",
    [
        ("tokenizer.json", "{}", r"tokenizer\.json is no tokenizer"),
        ("tokenizer.json", "{", r"tokenizer\.json is not JSON"),
        ("chat_template.jinja", "{% for %}", "is broken at line 1"),
    ],
)
def test_a_broken_tokenizer_is_named(tmp_path, file, content, said):
    directory = make_tiny_model(tmp_path / "hf")
    (directory / file).write_text(content)
    with pytest.raises(DataError, match=said):
        ChatTokenizer(directory)


SAY = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
BY_NAME = [{"name": "rag", "template": "x"}, {"name": "default", "template": SAY}]


@pytest.mark.parametrize(
    "template",
    [
        BY_NAME,
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
        "{{ strftime_now('%Y') }}{% for x in [1, 2] %}{% break %}{% endfor %}",
        "{{ bos_token }}{{ messages[0].content | trim }}{{ eos_token }}{{ add_eos_token }}",
        "{{ image_token }}{{ additional_special_tokens[0] }}{{ additional_special_tokens }}",
    ],
)
def test_a_template_is_rendered_as_by_transformers(tokenizer_dir, tmp_path, template):
    from transformers import AutoTokenizer

    directory = shutil.copytree(tokenizer_dir, tmp_path / "hf")
    file = directory / "tokenizer_config.json"
    stated = json.loads(file.read_text()) | {"chat_template": template, "add_eos_token": True}
    stated["extra_special_tokens"] = {"image_token": "<img>"}
    stated["additional_special_tokens"] = ["<a>", "<b>"]
    del stated["bos_token"]
    file.write_text(json.dumps(stated))
    theirs = AutoTokenizer.from_pretrained(directory)
    turns = [{"role": "user", "content": "<é> & 'x'"}]
    expected = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert ChatTokenizer(directory).render(turns) == expected


def test_the_environment_is_that_of_transformers():
    from transformers.utils.chat_template_utils import _compile_jinja_template

    from workshop_utils.core.chat_template import _environment

    ours, theirs = _environment(), _compile_jinja_template("x").environment
    for part in ("globals", "filters", "tests"):
        assert set(getattr(ours, part)) == set(getattr(theirs, part))
    tags = [
        {tag for each in env.extensions.values() for tag in each.tags} for env in (ours, theirs)
    ]
    assert tags[0] == tags[1]
    assert (ours.trim_blocks, ours.lstrip_blocks) == (theirs.trim_blocks, theirs.lstrip_blocks)


def test_templates_in_files_of_their_own(tokenizer_dir, tmp_path):
    directory = shutil.copytree(tokenizer_dir, tmp_path / "hf")
    (directory / "chat_template.jinja").write_text(SAY)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("x")
    assert ChatTokenizer(directory).render([{"role": "user", "content": "hi"}]) == "hi"


@pytest.mark.parametrize(
    "template, said",
    [
        ([{"name": "rag", "template": "x"}], "called rag, and none 'default'"),
        ([{"name": "rag"}], "is a list, and not of a name"),
        (["x"], "is a list, and not of a name"),
        (7, "is no text"),
        ("{{ messages + 1 }}", "refuses the conversation"),
        ("{{ raise_exception('no') }}", "refuses the conversation: no"),
        ("{{ messages[9].content.x }}", "refuses the conversation"),
    ],
)
def test_a_template_that_fails_is_a_sentence(tokenizer_dir, tmp_path, template, said):
    directory = shutil.copytree(tokenizer_dir, tmp_path / "hf")
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    with pytest.raises(DataError, match=said):
        ChatTokenizer(directory).render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff\xfe", '{"a": 1}'.encode("utf-16")])
def test_a_tokenizer_file_that_is_no_object(tmp_path, content):
    directory = make_tiny_model(tmp_path / "hf")
    (directory / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        ChatTokenizer(directory)

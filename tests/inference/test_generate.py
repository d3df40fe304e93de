"""Batched generation with a shared, cached prefix answers token for token as the plain, one-by-one
path."""

import pytest
import torch
from tiny_model import make_tiny_model

from workshop_utils.core.errors import NotACheckpoint
from workshop_utils.inference import generate

ASKED = [
    "number 3?",
    "a longer question, number 12345?",
    "x",
    "number 3?",
    "what is the number of the ticket that came before?",
]
CONVERSATIONS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": "never shown"}]
    for text in ASKED
]
PREFIX = [
    {"role": "user", "content": "Answer in one line.\n\nnumber 7?"},
    {"role": "assistant", "content": "it is 7"},
    {"role": "user", "content": "number 8?"},
    {"role": "assistant", "content": "it is 8"},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    # Large initial weights, so that answers differ from row to row; at 0.02 a random Llama repeats
    # one token.
    return make_tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.6)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two layers are not worth a second thread, least of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded(directory):
    return generate.load(directory)


def plain_ids(loaded, messages, max_new_tokens):
    """One row, no batch, no padding, no cache: the argmax after a full forward pass, again and
    again."""
    model, tokenizer = loaded
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    answer = []
    while len(answer) < max_new_tokens:
        with torch.inference_mode():
            token = int(model(torch.tensor([ids + answer]), use_cache=False).logits[0, -1].argmax())
        answer.append(token)
        if token == tokenizer.eos_token_id:
            break
    return answer


def plain(loaded, messages, max_new_tokens):
    return loaded[1].decode(plain_ids(loaded, messages, max_new_tokens), skip_special_tokens=True)


@pytest.mark.parametrize("prefix", [[], PREFIX], ids=["no prefix", "prefix"])
def test_equals_the_plain_path(loaded, prefix):
    expected = [plain(loaded, prefix + turns[:1], 12) for turns in CONVERSATIONS]
    assert len(set(expected)) > 2, "the rows' answers have to differ for this test to say anything"
    assert "<|" not in "".join(expected)
    for batch_size in (1, 3, 16):
        how = {"max_new_tokens": 12, "batch_size": batch_size, "progress": False}
        assert generate.generate(*loaded, CONVERSATIONS, prefix=prefix, **how) == expected


def test_shared_tokens_are_computed_once(loaded, monkeypatch):
    model, tokenizer = loaded
    widths, forward = [], model.forward

    def noted(*args, **kwargs):
        widths.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", noted)
    how = {"max_new_tokens": 2, "batch_size": 2, "progress": False}
    generate.generate(model, tokenizer, CONVERSATIONS, prefix=PREFIX, **how)
    longest = max(len(text) for text in ASKED) + len("<|im_start|>assistant\n")
    prefix_tokens = len(tokenizer.apply_chat_template(PREFIX))
    assert widths[0][0] == 1 and widths[0][1] >= prefix_tokens
    assert all(width <= longest for _, width in widths[1:])


def test_stops_at_the_stop_token(loaded, monkeypatch):
    """The row that wants to stop gets its text up to there, while its neighbour goes on."""
    model, tokenizer = loaded
    mine, neighbour = (plain_ids(loaded, turns[:1], 12) for turns in CONVERSATIONS[:2])
    stop = next(token for token in mine[1:] if token != mine[0] and token not in neighbour)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, stop])
    cut = generate.generate(model, tokenizer, CONVERSATIONS[:2], max_new_tokens=12, progress=False)
    assert cut[0] == tokenizer.decode(mine[: mine.index(stop) + 1])
    assert cut[1] == tokenizer.decode(neighbour, skip_special_tokens=True)


def test_adapter_changes_the_answers(directory, loaded, tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft = get_peft_model(generate.load(directory)[0], lora)
    peft.save_pretrained(tmp_path)
    model, tokenizer = generate.load(directory, tmp_path)
    ours, peft_s = (
        generate.generate(each, tokenizer, CONVERSATIONS, 12, progress=False)
        for each in (model, peft.eval())
    )
    assert ours == peft_s
    ids = [[5, 6, 7, 8]]
    tuned = generate.logits(model, ids)
    assert abs(tuned - generate.logits(loaded[0], ids)).max() > 1e-3
    assert (tuned == generate.logits(directory, ids, tmp_path)).all()


def test_system_message_stays_first():
    system, asked = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
    turns = [system, asked, {"role": "assistant", "content": "a"}]
    assert generate.with_prefix(PREFIX, turns) == [system, *PREFIX, asked]


def test_common_start_leaves_a_token_of_each():
    assert generate.common_start([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert generate.common_start([[1, 2], [1, 2], [1, 2, 3]]) == 1
    assert generate.common_start([[1], [2]]) == 0


def test_nothing_asked_and_no_model(loaded, tmp_path):
    assert generate.generate(*loaded, []) == []
    with pytest.raises(NotACheckpoint, match="config.json"):
        generate.load(tmp_path)

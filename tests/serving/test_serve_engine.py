"""Many requests in one batch get what each would get alone."""

import math
import threading
import time

import pytest
import torch
from serve_samples import held, write_base, write_nemo, write_peft

from workshop_utils.core.errors import UnsupportedAdapter, WorkshopError
from workshop_utils.inference.generate import load
from workshop_utils.serving.server import adapters
from workshop_utils.serving.server.engine import Engine, QueueFull, Row, UnknownModel
from workshop_utils.serving.server.sampling import RequestSampling, choose, generator

GREEDY = RequestSampling(max_new_tokens=12, temperature=0)
ADAPTERS = (None, "one", "two", "fused")
PROMPTS = ("a", "some words", "a much longer prompt than the others, to need padding")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    write_base(folder / "tiny")
    write_peft(folder / "one", 1)
    write_peft(folder / "two", 2)
    write_nemo(folder / "fused")
    return folder


@pytest.fixture
def engine(folder):
    made = Engine(*load(folder / "tiny"), max_batch=8, max_queue=40)
    for name in ("one", "two", "fused"):
        made.install(name, *adapters.read(folder / name)).result()
    yield made
    made.close()


class Asked:
    """A request and what came of it."""

    def __init__(
        self, engine, prompt: str, adapter: str | None, sampling: RequestSampling = GREEDY
    ):
        self.done, self.pieces = threading.Event(), []
        self.row = Row(engine.tokenizer(prompt).input_ids, sampling, self._take)
        engine.submit([self.row], adapter)

    def _take(self, piece) -> None:
        self.pieces.append(piece)
        if piece.finish:
            self.done.set()

    @property
    def text(self) -> str:
        assert self.done.wait(60)
        return "".join(piece.text for piece in self.pieces)


def every_kind() -> list[tuple]:
    samplings = (
        GREEDY,
        RequestSampling(max_new_tokens=12, temperature=0.8, top_p=0.9, seed=5),
        RequestSampling(max_new_tokens=12, temperature=1.5, top_p=1.0, seed=6),
    )
    return [
        (prompt, adapter, sampling)
        for prompt in PROMPTS
        for adapter in ADAPTERS
        for sampling in samplings
    ]


def test_same_text_alone_and_in_a_batch(engine):
    alone = [Asked(engine, *kind).text for kind in every_kind()]
    with held(engine):
        asked = [Asked(engine, *kind) for kind in every_kind()]
    assert [each.text for each in asked] == alone
    assert engine.widest == 8
    assert len(set(alone)) > len(alone) / 2  # adapters and seeds matter


def test_one_pass_for_rows_of_different_adapters(engine):
    before = engine.passes
    with held(engine):
        asked = [Asked(engine, PROMPTS[1], adapter) for adapter in ADAPTERS * 2]
    assert all(each.text is not None for each in asked)
    assert engine.passes - before == max(len(each.row.tokens) for each in asked) == 12
    assert engine.widest == 8


def test_eight_at_once_cost_less_than_one_after_the_other(engine):
    """At least 1.5 times the rate, in processor seconds of one thread: what else this machine does
    then changes nothing."""
    kinds = [
        (PROMPTS[1], adapter, RequestSampling(max_new_tokens=40, temperature=0))
        for adapter in ADAPTERS * 2
    ]

    def at_once() -> list[str]:
        with held(engine):
            asked = [Asked(engine, *kind) for kind in kinds]
        return [each.text for each in asked]

    def seconds(work) -> float:
        begin = time.process_time()
        work()
        return time.process_time() - begin

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = [Asked(engine, *kind).text for kind in kinds]
        assert at_once() == alone
        ratio = seconds(lambda: [Asked(engine, *kind).text for kind in kinds]) / seconds(at_once)
    finally:
        torch.set_num_threads(threads)
    assert ratio >= 1.5


def test_joins_while_others_run(engine):
    long = RequestSampling(max_new_tokens=150, temperature=0)
    expected = [Asked(engine, PROMPTS[2], "one", long).text, Asked(engine, PROMPTS[0], "two").text]
    before = engine.passes
    first = Asked(engine, PROMPTS[2], "one", long)
    while not first.pieces:
        pass
    second = Asked(engine, PROMPTS[0], "two")
    assert second.text == expected[1]
    assert not first.done.is_set()  # the short one has left again
    assert first.text == expected[0]
    assert engine.passes - before == 150 + 1  # one more: the second one's prompt


def test_logits_of_a_batch_are_those_of_a_row_alone(engine):
    with_logprobs = RequestSampling(max_new_tokens=12, temperature=0, logprobs=3)
    alone = [Asked(engine, prompt, "one", with_logprobs) for prompt in PROMPTS]
    assert all(each.text is not None for each in alone)
    with held(engine):
        together = [Asked(engine, prompt, "one", with_logprobs) for prompt in PROMPTS]
    assert [asked.text for asked in alone] == [asked.text for asked in together]
    first, second = (
        [token.logprob for asked in group for piece in asked.pieces for token in piece.tokens]
        for group in (alone, together)
    )
    assert first == pytest.approx(second, abs=1e-4)


def test_rows_under_way_keep_their_adapter(engine, folder):
    long = RequestSampling(max_new_tokens=60, temperature=0)
    old = Asked(engine, "a", "one", long).text
    running = Asked(engine, "a", "one", long)
    while not running.pieces:
        pass
    with held(engine):
        waiting = Asked(engine, "a", "one", long)
        replaced = engine.install("one", *adapters.read(folder / "two"))
    replaced.result()
    new = Asked(engine, "a", "one", long)
    assert running.text == waiting.text == old
    assert new.text == Asked(engine, "a", "two", long).text != old


def test_all_adapters_removed_and_one_back(engine, folder):
    base, one = Asked(engine, "a", None).text, Asked(engine, "a", "one").text
    for name in engine.adapters:
        engine.remove(name).result()
    assert Asked(engine, "a", None).text == base
    with pytest.raises(UnknownModel):
        Asked(engine, "a", "one")
    engine.install("one", *adapters.read(folder / "one")).result()
    assert Asked(engine, "a", "one").text == one
    assert engine._lora.peft_config.keys() == {engine._served["one"]}


def test_cancelled_rows_leave(engine):
    asked = Asked(engine, "a", "one", RequestSampling(max_new_tokens=30000, temperature=0))
    while not asked.pieces:
        pass
    asked.row.cancelled = True
    assert Asked(engine, "a", None).text
    assert not engine._running
    assert not asked.done.is_set()


def test_stop_strings_are_cut_and_never_given_out(engine):
    whole = Asked(engine, "a", None, RequestSampling(max_new_tokens=40, temperature=0)).text
    stop = whole[9:12]
    asked = Asked(
        engine,
        "a",
        None,
        RequestSampling(max_new_tokens=40, temperature=0, stop=("never there", stop)),
    )
    assert asked.text == whole[: whole.index(stop)]
    assert asked.pieces[-1].finish == "stop"


def test_stop_token_ends_a_row_and_is_no_text(engine):
    whole = Asked(engine, "a", None)
    assert whole.text and whole.pieces[-1].finish == "length"
    engine._stop_ids = {whole.row.tokens[5]}
    asked = Asked(engine, "a", None)
    assert asked.text == engine.tokenizer.decode(asked.row.tokens, skip_special_tokens=True)
    assert asked.pieces[-1].finish == "stop"
    assert asked.row.tokens == whole.row.tokens[: len(asked.row.tokens)]


@pytest.mark.parametrize(("scale", "temperature"), [(1, 1e-300), (1e25, 0), (1e25, 1)])
def test_numbers_that_overflow_end_nothing(engine, folder, scale, temperature):
    config, tensors = adapters.read(folder / "one")
    engine.install("huge", config, {key: value * scale for key, value in tensors.items()}).result()
    asked = Asked(
        engine, "a", "huge", RequestSampling(max_new_tokens=4, temperature=temperature, logprobs=2)
    )
    assert asked.text is not None and asked.pieces[-1].finish == "length"
    assert all(math.isfinite(token.logprob) for piece in asked.pieces for token in piece.tokens)
    assert Asked(engine, "a", None).text


def test_replaced_adapters_leave_nothing_behind(engine, folder):
    def layers() -> list[tuple]:
        modules = engine._lora.named_modules()
        return [(name, len(each)) for name, each in modules if name.endswith(("lora_A", "lora_B"))]

    before = layers()
    for _ in range(5):
        engine.install("one", *adapters.read(folder / "two")).result()
    assert Asked(engine, "a", "one").text
    assert layers() == before


def test_a_fault_is_told_to_all_who_wait(folder):
    made = Engine(*load(folder / "tiny"))
    with held(made):
        first, second = made._job(lambda: 1 / 0), made._job(lambda: None)
    for future in (first, second):
        with pytest.raises(WorkshopError, match="stopping"):
            future.result(10)
    with pytest.raises(ZeroDivisionError):
        made.thread.result()


def test_full_queue(engine):
    with held(engine):
        asked = [Asked(engine, "a", None) for _ in range(40)]
        with pytest.raises(QueueFull, match="40 requests are waiting"):
            Asked(engine, "a", None)
    assert len({each.text for each in asked}) == 1


def test_adapter_of_another_model(engine, folder):
    config, tensors = adapters.read(folder / "one")
    half = next(iter(tensors))
    others = {key.replace("layers.1", "layers.7"): value for key, value in tensors.items()}
    for wrong, said in (
        (tensors | {half: tensors[half][:, :-1]}, "another model"),
        (others, "no linear layer of the base"),
        ({key: value for key, value in tensors.items() if key != half}, "missing"),
    ):
        with pytest.raises(UnsupportedAdapter, match=said):
            engine.install("x", config, wrong).result()
    assert "x" not in engine.adapters
    assert Asked(engine, "a", "one").text


def test_close_tells_those_who_wait(engine):
    asked = Asked(engine, "a", None, RequestSampling(max_new_tokens=30000, temperature=0))
    engine.close()
    assert asked.done.wait(10)
    assert asked.pieces[-1].finish == "error"
    with pytest.raises(QueueFull):
        Asked(engine, "a", None)


def test_top_k_draws_among_the_likeliest():
    logits, random = torch.tensor([0.0, 2.0, 1.0, -1.0]), generator(0)
    drawn = {choose(logits, RequestSampling(top_k=2, temperature=2.0), random) for _ in range(200)}
    assert drawn == {1, 2}
    assert choose(logits, RequestSampling(top_k=1, temperature=2.0), random) == 1

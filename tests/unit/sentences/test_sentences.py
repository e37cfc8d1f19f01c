"""Sentences: token tables of several tokenizers, segmentation, and the tracker against direct computation."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.ops import dispatch, native
from skipkv_vllm.policies import SentenceOptions
from skipkv_vllm.sentences import Sentence, SentenceTables, build_tables, split_sentences
from skipkv_vllm.sentences.recurrence import GRAM
from skipkv_vllm.worker.signals.sentence_tracker import SentenceTracker, TrackedTokens

# ---- tokenizers


def byte_level(merged: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE that makes each given string one token; earlier strings take precedence."""
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []

    def build() -> Tokenizer:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    for text in merged:
        joined, *rest = build().encode(text).tokens
        for symbol in rest:
            merges.append((joined, symbol))
            joined += symbol
            vocab.setdefault(joined, len(vocab))
    return PreTrainedTokenizerFast(tokenizer_object=build(), clean_up_tokenization_spaces=False)


def sentence_piece() -> PreTrainedTokenizerFast:
    """Return a BPE like that of Llama 2: spaces are "▁", and a newline is the byte token <0x0A>."""
    pieces = [*(f"<0x{i:02X}>" for i in range(256)), "▁", *"WaitAlterntivygo.):,"]
    merges = [("W", "a"), ("Wa", "i"), ("Wai", "t"), ("▁", "Wait")]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "Wa", "Wai", "Wait", "▁Wait"]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def qwen_like() -> PreTrainedTokenizerFast:
    """Train the bundled model's tokenizer, which takes some seconds."""
    from benchmarks.tiny_reasoner.tokenizer import build_tokenizer

    return build_tokenizer()


def texts(tokenizer: PreTrainedTokenizerFast, ids: frozenset[int]) -> set[str]:
    return {tokenizer.decode([i]) for i in ids}


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


# ---- tables


def test_delimiters_are_closing_punctuation_and_newlines():
    endings = ["\n\n", ".\n\n", ".\n", " .\n", ").\n\n", "?\n", "!\n", '."\n', "]\n", "}\n\n", "。\n", "’\n", "'\n"]
    others = [":\n", ",\n", " \t", "a\n", "\n ", ";\n", "\n\na", "(\n", "..."]
    tokenizer = byte_level(["\n\n\n", *endings, *others])
    for text in (*endings, *others):
        assert len(encode(tokenizer, text)) == 1, f"the test's tokenizer does not merge {text!r}"
    found = texts(tokenizer, build_tables(tokenizer).delimiters)
    assert found == {"\n", "\n\n", "\n\n\n", *endings}


def test_delimiters_of_a_sentence_piece_tokenizer_are_byte_tokens():
    tokenizer = sentence_piece()
    tables = build_tables(tokenizer)
    assert tables.delimiters == {tokenizer.convert_tokens_to_ids("<0x0A>")}
    assert encode(tokenizer, "go.\n")[-1] in tables.delimiters
    wait, space_wait = (tokenizer.convert_tokens_to_ids(t) for t in ("Wait", "▁Wait"))
    assert {(wait,), (space_wait,)} <= set(tables.keywords)
    # "again" takes five pieces here and six with its space.
    assert {len(word) for word in tables.keywords if tokenizer.decode(list(word)).strip() == "again"} == {5, 6}
    sentences = split_sentences(encode(tokenizer, "go.\n Wait go\n\ngo again\ngo"), build_tables(tokenizer))
    assert [s.is_execution for s in sentences] == [True, False, False]


def test_delimiters_of_the_bundled_tokenizer(qwen_like):
    found = texts(qwen_like, build_tables(qwen_like).delimiters)
    assert "\n" in found
    assert any("." in text for text in found), "a full stop with its newlines should be one token"
    assert all(text.endswith("\n") and not set(text) & set(":,;abcxyz0123") for text in found)


def test_keywords_count_with_and_without_space_and_in_either_case():
    tokenizer = byte_level(["\n\n", "Wait", " Wait", " again"])
    words = {tokenizer.decode(list(word)) for word in build_tables(tokenizer).keywords}
    assert words == {
        f"{space}{word}"
        for space in ("", " ")
        for word in ("Wait", "wait", "Alternatively", "alternatively", "again", "Again")
    }


def test_published_tables_are_the_last_ids_of_the_published_strings():
    tokenizer = byte_level(["\n\n", ".\n", ".\n\n", " .\n", ")\n", ":\n", "Wait", " again"])
    tables = build_tables(tokenizer, compat="published")
    last = {encode(tokenizer, text)[-1] for text in ("\n", ".\n", ")\n", "\n\n", ".\n\n", ")\n\n", "?\n\n")}
    assert tables.delimiters == last
    # " .\n" is a delimiter by default and unknown to the published code.
    assert encode(tokenizer, " .\n")[0] in build_tables(tokenizer).delimiters - tables.delimiters
    assert set(tables.keywords) == {(encode(tokenizer, word)[-1],) for word in ("Wait", "Alternatively", "again")}
    assert not tables.merges_delimiters
    assert tables.penalty_rule == "last"


def test_default_tables_merge_delimiters_and_take_the_highest_repeat(qwen_like):
    tables = build_tables(qwen_like)
    assert tables.merges_delimiters
    assert tables.penalty_rule == "max"


def test_unknown_compat_is_refused(qwen_like):
    with pytest.raises(KVPolicyError, match="compat='paper' is unknown; choose one of: default, published"):
        build_tables(qwen_like, compat="paper")


def test_a_tokenizer_without_newlines_is_refused_with_a_remedy():
    vocab = {"a": 0, "b": 1, "[UNK]": 2}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="[UNK]")))
    with pytest.raises(KVPolicyError, match=r"no token that ends in a newline.*--kv-policy rkv"):
        build_tables(tokenizer)


# ---- segment

DOT, WAIT, A, OF, NL = 10, 11, 1, 2, 13
TABLES = SentenceTables(frozenset({DOT, NL}), ((WAIT,), (A, OF)), True, "max")
PUBLISHED = SentenceTables(TABLES.delimiters, TABLES.keywords, False, "last")


def test_segment_literal():
    assert split_sentences([1, 3, DOT, 4, 5, 6, NL, 7], TABLES) == [Sentence(0, 3, True), Sentence(3, 7, True)]


def test_consecutive_delimiters_extend_the_sentence_before_them():
    assert split_sentences([3, DOT, NL, NL, 4, DOT], TABLES) == [Sentence(0, 4, True), Sentence(4, 6, True)]


def test_consecutive_delimiters_are_sentences_in_published_tables():
    assert split_sentences([3, DOT, NL, 4, DOT], PUBLISHED) == [
        Sentence(0, 2, True),
        Sentence(2, 3, True),
        Sentence(3, 5, True),
    ]


def test_a_leading_delimiter_is_a_sentence_and_takes_the_following_ones():
    assert split_sentences([NL, NL, 5, DOT], TABLES) == [Sentence(0, 2, True), Sentence(2, 4, True)]


def test_keywords_of_several_tokens_must_be_consecutive_and_inside_one_sentence():
    assert split_sentences([A, OF, DOT], TABLES)[0].is_execution is False
    assert split_sentences([A, 5, OF, DOT], TABLES)[0].is_execution is True
    assert [s.is_execution for s in split_sentences([5, A, DOT, OF, WAIT, DOT], TABLES)] == [True, False]


def test_segment_of_real_text(qwen_like):
    text = "The answer is 12.\n\nWait, let me check it again.\nThis is right: \n a list.\n\n\nso"
    ids = encode(qwen_like, text)
    sentences = split_sentences(ids, build_tables(qwen_like))
    spelt = [qwen_like.decode(ids[s.start : s.end]) for s in sentences]
    assert "".join(spelt) + "so" == text
    assert spelt[0] == "The answer is 12.\n\n"
    assert spelt[1] == "Wait, let me check it again.\n"
    assert [s.is_execution for s in sentences[:3]] == [True, False, True]


def test_published_tables_miss_keywords_with_a_space():
    tokenizer = byte_level([".\n\n", " again"])
    ids = encode(tokenizer, "check again.\n\n")
    assert split_sentences(ids, build_tables(tokenizer))[0].is_execution is False
    assert split_sentences(ids, build_tables(tokenizer, "published"))[0].is_execution is True


streams = st.lists(st.sampled_from([A, OF, 3, 4, WAIT, DOT, NL]), max_size=60)


@settings(max_examples=300, deadline=None)
@given(streams, st.booleans())
def test_sentences_tile_the_text(tokens, merges):
    sentences = split_sentences(tokens, TABLES if merges else PUBLISHED)
    end = 0
    for sentence in sentences:
        assert sentence.start == end < sentence.end
        end = sentence.end
        body = tokens[sentence.start : sentence.end]
        first = next(i for i, t in enumerate(body) if t in (DOT, NL))
        # Everything after the first delimiter is a delimiter too, and only if delimiters are merged.
        assert all(t in (DOT, NL) for t in body[first:])
        assert merges or first == len(body) - 1
        text = ",".join(map(str, ["", *body, ""]))
        assert sentence.is_execution == (f",{WAIT}," not in text and f",{A},{OF}," not in text)
    assert not set(tokens[end:]) & {DOT, NL}
    if merges:
        # Only the first sentence can begin with a delimiter.
        assert not any(tokens[s.start] in (DOT, NL) for s in sentences[1:])


# ---- the tracker

HIDDEN = 6
FOREVER = torch.iinfo(torch.int32).max


class Text(NamedTuple):
    """A request as the tracker must see it."""

    first: int
    tokens: list[int]
    hidden: Tensor


def make_text(seed: int, length: int, first: int = 0) -> Text:
    """Return random tokens and hidden states; each sentence has one of three topics, so that some repeat."""
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    topics = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    tokens = [chance.choice([A, OF, 3, 4, WAIT, DOT, DOT, NL]) for _ in range(length)]
    topic, rows = 0, []
    for token in tokens:
        rows.append(topics[topic] + 0.05 * torch.randn(HIDDEN, generator=generator))
        if token in (DOT, NL):
            topic = chance.randrange(3)
    return Text(first, tokens, torch.stack(rows) if rows else torch.zeros(0, HIDDEN))


@pytest.fixture(scope="module", params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Makes trackers use the C++ operators, then their definitions in PyTorch."""
    if request.param == "native" and (why := native.unavailable("cpu")):
        pytest.skip(f"the C++ operators: {why}")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(dispatch.OVERRIDE, request.param)
        dispatch.choose.cache_clear()
        yield request.param
    dispatch.choose.cache_clear()


class MakeTracker(Protocol):
    def __call__(
        self, tables: SentenceTables = ..., hidden: int = ..., slots: int = ..., keeps_text: bool = ..., **options: Any
    ) -> SentenceTracker: ...


@pytest.fixture(scope="module")
def make_tracker(backend: str) -> MakeTracker:
    def make(
        tables: SentenceTables = TABLES,
        hidden: int = HIDDEN,
        slots: int = 4,
        keeps_text: bool = False,
        **options: Any,
    ) -> SentenceTracker:
        options = {"similarity_threshold": 0.9, "max_sentences": 64} | options
        tracker = SentenceTracker(
            tables,
            SentenceOptions(**options),
            num_rows=slots,
            max_length=100,
            hidden_size=0 if keeps_text else hidden,
            vocab_size=20,
            dtype=torch.float32,
            device=torch.device("cpu"),
            keeps_text=keeps_text,
        )
        assert dispatch.choose("track_sentences", "cpu").backend == backend
        return tracker

    return make


def feed(tracker: SentenceTracker, parts: list[tuple[int, Text, int, int]]) -> None:
    """Run one step: tokens `[start, end)` of each text, counted from its first tracked token."""
    counts = torch.tensor([end - start for _, _, start, end in parts])
    tracker.update(
        TrackedTokens(
            token_ids=torch.tensor([t for _, text, start, end in parts for t in text.tokens[start:end]]),
            spans=torch.stack(
                [
                    torch.tensor([slot for slot, *_ in parts]),
                    counts.cumsum(0) - counts,
                    counts,
                    torch.tensor([text.first + start for _, text, start, _ in parts]),
                ]
            ),
            num_tokens=int(counts.sum()),
            hidden=torch.cat([text.hidden[start:end] for _, text, start, end in parts])
            if tracker.has_embeddings
            else None,
        )
    )


def expected_ends(text: Text, tables: SentenceTables) -> list[int]:
    return [text.first + s.end - 1 for s in split_sentences(text.tokens, tables)]


def expected_embeddings(text: Text, tables: SentenceTables) -> Tensor:
    """Normalised mean hidden state up to and including the first delimiter of each sentence."""
    rows = []
    for sentence in split_sentences(text.tokens, tables):
        end = next(i for i in range(sentence.start, sentence.end) if text.tokens[i] in tables.delimiters) + 1
        mean = text.hidden[sentence.start : end].double().mean(0)
        rows.append(mean / mean.norm())
    return torch.stack(rows).float() if rows else torch.zeros(0, HIDDEN)


def pair_penalties(embeddings: Tensor, threshold: float, rule: str) -> list[float]:
    result = []
    for i in range(len(embeddings)):
        cosines = [float(embeddings[i] @ embeddings[j]) for j in range(i + 1, len(embeddings))]
        above = [c for c in cosines if c > threshold]
        result.append(0.0 if not above else max(above) if rule == "max" else above[-1])
    return result


def assert_state(tracker: SentenceTracker, slot: int, text: Text) -> None:
    """Check that the tracker knows exactly the sentences of the text."""
    tables = tracker.tables
    ends = expected_ends(text, tables)
    state = tracker.state(slot)
    assert state.first == text.first
    assert state.ends[: len(ends)].tolist() == ends
    assert (state.ends[len(ends) :] == FOREVER).all()
    if not tracker.has_embeddings:
        assert not state.penalties.any()
        return
    embeddings = expected_embeddings(text, tables)
    torch.testing.assert_close(tracker._embeddings[slot, : len(ends)], embeddings, rtol=1e-4, atol=1e-5)
    wanted = pair_penalties(embeddings, tracker.options.similarity_threshold, tables.penalty_rule)
    torch.testing.assert_close(state.penalties[: len(ends)], torch.tensor(wanted), rtol=1e-4, atol=1e-5)
    assert not state.penalties[len(ends) :].any()


@pytest.mark.parametrize("tables", [TABLES, PUBLISHED], ids=["default", "published"])
@pytest.mark.parametrize("seed", range(6))
def test_one_request_in_one_step(make_tracker, seed, tables):
    tracker, text = make_tracker(tables), make_text(seed, 60)
    tracker.reset(0, 0)
    feed(tracker, [(0, text, 0, 60)])
    assert any(tracker.state(0).penalties > 0), "the example must repeat a sentence"
    assert_state(tracker, 0, text)


@pytest.mark.parametrize("hidden", [HIDDEN, 0], ids=["embeddings", "ends only"])
@pytest.mark.parametrize("tables", [TABLES, PUBLISHED], ids=["default", "published"])
@pytest.mark.parametrize("seed", range(8))
def test_any_chunking_of_several_requests_gives_the_same_state(make_tracker, seed, tables, hidden):
    chance = random.Random(seed)
    tracker = make_tracker(tables, hidden)
    chosen = {
        slot: make_text(100 * seed + slot, chance.randint(1, 80), first=chance.choice([0, 5])) for slot in (2, 0, 3)
    }
    for slot, text in chosen.items():
        tracker.reset(slot, text.first)
    done = dict.fromkeys(chosen, 0)
    while any(done[slot] < len(text.tokens) for slot, text in chosen.items()):
        parts = []
        for slot, text in chosen.items():
            left = len(text.tokens) - done[slot]
            if left and chance.random() < 0.8:
                count = min(left, chance.choice([1, 1, 1, 2, 5, 30]))
                parts.append((slot, text, done[slot], done[slot] + count))
                done[slot] += count
        if parts:
            chance.shuffle(parts)
            feed(tracker, parts)
        if chance.random() < 0.2:
            # Reading must not change later results.
            for slot in chosen:
                tracker.state(slot)
    for slot, text in chosen.items():
        assert_state(tracker, slot, text)


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.sampled_from([3, DOT, NL]), min_size=1, max_size=30),
    cuts=st.sets(st.integers(1, 29)),
    merges=st.booleans(),
)
def test_delimiters_at_every_step_border(make_tracker, tokens, cuts, merges):
    hidden = torch.randn(len(tokens), HIDDEN, generator=torch.Generator().manual_seed(len(tokens)))
    text = Text(0, tokens, hidden)
    tracker = make_tracker(TABLES if merges else PUBLISHED)
    tracker.reset(1, 0)
    borders = [0, *sorted(c for c in cuts if c < len(tokens)), len(tokens)]
    for start, end in itertools.pairwise(borders):
        feed(tracker, [(1, text, start, end)])
    assert_state(tracker, 1, text)


def test_reset_forgets_everything(make_tracker):
    tracker = make_tracker()
    tracker.reset(0, 0)
    # Ends in the middle of a sentence; in row 1 right after a delimiter.
    old, other = make_text(1, 50), Text(0, [3, DOT], torch.ones(2, HIDDEN))
    feed(tracker, [(0, old, 0, 50), (1, other, 0, 2)])
    tracker.state(0)
    for slot in (0, 1):
        tracker.reset(slot, 7)
        text = Text(7, [NL, 3, 4, DOT, 3], torch.randn(5, HIDDEN))
        feed(tracker, [(slot, text, 0, 5)])
        assert_state(tracker, slot, text)


def test_reset_leaves_other_slots_alone(make_tracker):
    tracker, text = make_tracker(), make_text(3, 40)
    tracker.reset(0, 0)
    tracker.reset(1, 0)
    feed(tracker, [(0, text, 0, 40), (1, text, 0, 40)])
    tracker.reset(1, 0)
    assert_state(tracker, 0, text)
    assert (tracker.state(1).ends == FOREVER).all()


@pytest.mark.parametrize("tables", [TABLES, PUBLISHED], ids=["default", "published"])
@pytest.mark.parametrize("seed", range(4))
def test_only_the_newest_embeddings_are_compared_and_old_penalties_stay(make_tracker, seed, tables):
    kept = 5
    tracker, text = make_tracker(tables, max_sentences=kept), make_text(seed, 90)
    tracker.reset(0, 0)
    embeddings = expected_embeddings(text, tables)
    known = [0.0] * len(embeddings)
    for start in range(0, 90, 6):
        feed(tracker, [(0, text, start, start + 6)])
        closed = len(split_sentences(text.tokens[: start + 6], tables))
        oldest = max(0, closed - kept)
        fresh = pair_penalties(embeddings[oldest:closed], 0.9, tables.penalty_rule)
        for i, value in enumerate(fresh, start=oldest):
            known[i] = max(known[i], value) if tables.penalty_rule == "max" else value or known[i]
        state = tracker.state(0)
        torch.testing.assert_close(state.penalties[:closed], torch.tensor(known[:closed]), rtol=1e-4, atol=1e-5)
    assert state.ends[:closed].tolist() == expected_ends(text, tables)
    assert sum(value > 0 for value in known[: closed - kept]) >= 1, "an old sentence must keep a penalty"


@pytest.mark.parametrize("threads", [1, 2])
def test_one_step_that_closes_more_sentences_than_are_kept(backend, threads):
    # A long prompt chunk, so large that PyTorch shares the work among threads: of two writes to the
    # same entry, that of the later sentence need not be the last one.
    kept, count, size = 16, 1200, 512
    tracker = SentenceTracker(
        TABLES,
        SentenceOptions(max_sentences=kept),
        num_rows=1,
        max_length=2 * count,
        hidden_size=size,
        vocab_size=20,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    hidden = torch.randn(2 * count, size, generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.normalize(hidden.view(count, 2, size).mean(1), dim=-1)[-kept:]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(5):
            tracker.reset(0, 0)
            feed(tracker, [(0, Text(0, [3, DOT] * count, hidden), 0, 2 * count)])
            held = torch.stack([tracker._embeddings[0, number % kept] for number in range(count - kept, count)])
            torch.testing.assert_close(held, wanted, rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_more_embeddings_than_tokens_fit(make_tracker):
    tracker, text = make_tracker(max_sentences=4096), make_text(5, 90)
    tracker.reset(0, 0)
    feed(tracker, [(0, text, 0, 90)])
    assert_state(tracker, 0, text)


def test_a_sequence_of_delimiters_alone_fills_the_table(make_tracker):
    # As many sentences as tokens fit: the last usable entry must differ from the discarded one.
    tracker = make_tracker(PUBLISHED)
    text = Text(0, [DOT] * 100, torch.randn(100, HIDDEN))
    tracker.reset(0, 0)
    feed(tracker, [(0, text, 0, 100)])
    assert tracker.state(0).ends[:100].tolist() == list(range(100))


def test_sentence_numbers_and_penalties_of_positions(make_tracker):
    tracker = make_tracker()
    a, b = torch.eye(HIDDEN)[0], torch.eye(HIDDEN)[1]
    # Tracked from position 4: sentences 4-5 (a), 6-8 (b), 9-10 (a), open 11.
    text = Text(4, [3, DOT, 3, 3, DOT, 3, DOT, 3], torch.stack([a, a, b, b, b, a, a, b]))
    tracker.reset(0, 4)
    feed(tracker, [(0, text, 0, 8)])
    state = tracker.state(0)
    positions = torch.tensor([[0, 3, 4, 5, 6, 8], [9, 10, 11, 12, 4, 7]], dtype=torch.int32)
    assert state.sentence_of(positions).tolist() == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 1, 2]]
    penalties = tracker.penalties(torch.tensor([0]), positions[None, None], torch.tensor([100]), 100)[0, 0]
    torch.testing.assert_close(
        penalties, torch.tensor([[0.0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0]]), rtol=1e-5, atol=1e-5
    )


def test_penalty_and_numbers_without_any_closed_sentence(make_tracker):
    tracker = make_tracker()
    tracker.reset(0, 2)
    state = tracker.state(0)
    assert state.sentence_of(torch.tensor([0, 2, 50])).tolist() == [0, 1, 1]
    positions = torch.tensor([[[[0, 2, 50]]]], dtype=torch.int32)
    assert tracker.penalties(torch.tensor([0]), positions, torch.tensor([3]), 3).tolist() == [[[[0.0, 0.0, 0.0]]]]


def test_similar_pairs_are_the_pairs_above_the_threshold(make_tracker):
    tracker, text = make_tracker(), make_text(2, 60)
    tracker.reset(0, 0)
    feed(tracker, [(0, text, 0, 60)])
    embeddings = expected_embeddings(text, TABLES)
    wanted = {
        (i, j): float(embeddings[i] @ embeddings[j])
        for i in range(len(embeddings))
        for j in range(i + 1, len(embeddings))
        if embeddings[i] @ embeddings[j] > 0.9
    }
    pairs, cosines = tracker.similar_pairs(0)
    got = dict(zip(map(tuple, pairs.tolist()), cosines.tolist(), strict=True))
    assert wanted
    assert got == pytest.approx(wanted, rel=1e-4)


# ---- the tracker's text


def worded_text(seed: int, length: int, first: int = 0) -> Text:
    """Return random tokens with stretches that repeat earlier ones."""
    chance = random.Random(seed)
    tokens: list[int] = []
    while len(tokens) < length:
        if tokens and chance.random() < 0.3:
            start = chance.randrange(len(tokens))
            tokens += tokens[start : start + chance.randint(8, 16)]
        else:
            tokens.append(chance.choice([A, OF, 3, 4, 5, 6, 7, WAIT, DOT, NL]))
    return Text(first, tokens[:length], torch.zeros(length, 0))


def shares_of(text: Text, tables: SentenceTables) -> list[float]:
    """Return by position the share of its sentence inside phrases that occur again later."""
    phrases = [tuple(text.tokens[i : i + GRAM]) for i in range(len(text.tokens) - GRAM + 1)]
    again = {i + k for i, phrase in enumerate(phrases) if phrase in phrases[i + 1 :] for k in range(GRAM)}
    shares = [0.0] * (text.first + len(text.tokens))
    for s in split_sentences(text.tokens, tables):
        share = sum(i in again for i in range(s.start, s.end)) / (s.end - s.start)
        shares[text.first + s.start : text.first + s.end] = [share] * (s.end - s.start)
    return shares


def repeats_of(text: Text, tables: SentenceTables) -> dict[tuple[int, int], float]:
    """Return pairs of closed sentences: each with the next one that repeats most of it, and the share."""
    sentences, counts = split_sentences(text.tokens, tables), {}
    closed = text.tokens[: sentences[-1].end] if sentences else []
    number = {i: n for n, s in enumerate(sentences) for i in range(s.start, s.end)}
    for i in range(len(closed) - GRAM + 1):
        later = (j for j in range(i + 1, len(closed) - GRAM + 1) if closed[j : j + GRAM] == closed[i : i + GRAM])
        if (j := next(later, None)) is not None:
            counts[number[i], number[j]] = counts.get((number[i], number[j]), 0) + 1
    found = {}
    for (earlier, later), count in counts.items():
        phrases = max(1, sentences[earlier].end - sentences[earlier].start - GRAM + 1)
        if earlier != later and count > phrases / 2:
            found[earlier, later] = min(1.0, count / phrases)
    return found


def assert_shares(tracker: SentenceTracker, texts: dict[int, Text]) -> None:
    """Check penalties by logical position, of several requests at once, each in two heads of different order."""
    lengths = [text.first + len(text.tokens) for text in texts.values()]
    longest = max(lengths)
    # Entries beyond a shorter request's tokens may have any value.
    positions = torch.randint(0, 5 * longest, (len(texts), 1, 2, longest), generator=torch.Generator().manual_seed(1))
    for row, length in zip(positions, lengths, strict=True):
        row[0, 0, :length], row[0, 1, :length] = torch.arange(length), torch.arange(length).flip(0)
    found = tracker.penalties(torch.tensor(list(texts)), positions.int(), torch.tensor(lengths), longest)
    assert found.shape == positions.shape
    for row, length, text in zip(found, lengths, texts.values(), strict=True):
        wanted = torch.tensor(shares_of(text, tracker.tables))
        torch.testing.assert_close(row[0, 0, :length], wanted)
        torch.testing.assert_close(row[0, 1, :length], wanted.flip(0))


@pytest.mark.parametrize("tables", [TABLES, PUBLISHED], ids=["default", "published"])
@pytest.mark.parametrize("seed", range(8))
def test_shares_do_not_depend_on_the_steps_that_brought_the_text(make_tracker, seed, tables):
    """Chunks, single tokens, and steps of both; all requests differ in length and beginning."""
    chance = random.Random(seed)
    tracker = make_tracker(tables, keeps_text=True)
    texts = {
        slot: worded_text(10 * seed + slot, chance.randint(1, 90), first=chance.choice([0, 3, 9])) for slot in (3, 0, 2)
    }
    for slot, text in texts.items():
        tracker.reset(slot, text.first)
    done = dict.fromkeys(texts, 0)
    while any(done[slot] < len(text.tokens) for slot, text in texts.items()):
        parts, most = [], chance.choice([1, 1, 2, 30])
        for slot, text in texts.items():
            if (left := len(text.tokens) - done[slot]) and chance.random() < 0.8:
                count = min(left, chance.randint(1, most))
                parts.append((slot, text, done[slot], done[slot] + count))
                done[slot] += count
        if parts:
            chance.shuffle(parts)
            feed(tracker, parts)
    assert_shares(tracker, texts)
    assert any(share > 0 for text in texts.values() for share in shares_of(text, tables)), "nothing is repeated"
    for slot, text in texts.items():
        assert_state(tracker, slot, text)


def test_shares_grow_with_the_text(make_tracker):
    tracker, text = make_tracker(keeps_text=True), worded_text(3, 80, first=4)
    tracker.reset(1, 4)
    for i in range(80):
        feed(tracker, [(1, text, i, i + 1)])
        assert_shares(tracker, {1: Text(4, text.tokens[: i + 1], text.hidden)})


def test_a_row_forgets_the_words_of_its_last_request(make_tracker):
    """Old words stay in the buffer, before and behind the new ones; they must not count as repeats."""
    tracker, words = make_tracker(keeps_text=True), worded_text(5, 30).tokens
    old, other = Text(0, words * 3, torch.zeros(90, 0)), worded_text(6, 90)
    tracker.reset(2, 0)
    tracker.reset(3, 0)
    feed(tracker, [(2, old, 0, 90), (3, other, 0, 90)])
    for first in (0, 30):
        new = Text(first, words, torch.zeros(30, 0))
        tracker.reset(2, first)
        feed(tracker, [(2, new, 0, 30)])
        assert_shares(tracker, {2: new})
        assert_shares(tracker, {2: new, 3: other})
        assert_pairs(tracker, 2, new)


def assert_pairs(tracker: SentenceTracker, slot: int, text: Text) -> dict[tuple[int, int], float]:
    pairs, shares = tracker.similar_pairs(slot)
    assert (pairs.dtype, shares.dtype) == (torch.int64, torch.float32)
    wanted = repeats_of(text, tracker.tables)
    assert dict(zip(map(tuple, pairs.tolist()), shares.tolist(), strict=True)) == pytest.approx(wanted)
    return wanted


@pytest.mark.parametrize("tables", [TABLES, PUBLISHED], ids=["default", "published"])
def test_similar_pairs_by_words(make_tracker, tables):
    found, sizes = 0, set()
    for seed in range(30):
        tracker, text = make_tracker(tables, keeps_text=True), worded_text(seed, 3 * seed + 1, first=seed % 3)
        tracker.reset(1, text.first)
        feed(tracker, [(1, text, 0, len(text.tokens))])
        pairs = assert_pairs(tracker, 1, text)
        found += len(pairs)
        sizes |= {share == 1 for share in pairs.values()}
    assert found > 10
    assert sizes == {True, False}, "both sentences must be repeated, one wholly and one in part"


def test_a_sentence_that_repeats_itself_is_no_pair(make_tracker):
    tracker, text = make_tracker(keeps_text=True), Text(0, [3, 4] * 8 + [DOT, 5, DOT], torch.zeros(19, 0))
    tracker.reset(0, 0)
    feed(tracker, [(0, text, 0, 19)])
    assert_shares(tracker, {0: text})
    assert shares_of(text, TABLES)[0] > 0.5
    assert len(tracker.similar_pairs(0)[0]) == 0


def test_similar_pairs_where_nothing_is_closed(make_tracker):
    tracker = make_tracker(keeps_text=True)
    tracker.reset(0, 5)
    assert tracker.similar_pairs(0)[0].shape == (0, 2)
    text = Text(5, [3, 4, 5, 6, 7, 3, 4, 5, 6, 7, 3, 4], torch.zeros(12, 0))
    feed(tracker, [(0, text, 0, 12)])
    assert tracker.similar_pairs(0)[0].shape == (0, 2)
    assert tracker.similar_pairs(0)[1].shape == (0,)


def test_text_and_embeddings_are_kept_only_where_they_are_compared(make_tracker):
    by_words, by_states, neither = make_tracker(keeps_text=True), make_tracker(), make_tracker(hidden=0)
    assert [tracker.compares for tracker in (by_words, by_states, neither)] == [True, True, False]
    # 4 bytes for each of 101 places of 4 rows.
    assert by_words.nbytes - neither.nbytes == 4 * 4 * 101
    assert by_states.nbytes > by_words.nbytes


def test_buffers_are_accounted_for(make_tracker):
    tracker = make_tracker(hidden=16, slots=2, max_sentences=8)
    # The embeddings alone: 2 requests, 8 + 1 rows, 16 floats.
    assert tracker.nbytes > 2 * 9 * 16 * 4
    assert make_tracker(hidden=0, slots=2).nbytes < tracker.nbytes

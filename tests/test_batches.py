"""Batches of pretraining: tokens, types, labels and masks, and what a model is trained on and judged by."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from corpora import TinyShard, TinyVocabulary, random_shard
from models import assert_near, assert_same_gradients, gradients, one_thread, randomise  # noqa: F401

import bert_fast
from benchmarks.pretrain import padded
from bert_fast.functional import IGNORED
from bert_fast.pretraining import batches, objective
from bert_fast.pretraining.batches import Masking, PretrainingBatch, assemble, word_ids
from bert_fast.pretraining.instances import IS_NEXT, IS_OTHER
from bert_fast.pretraining.objective import SUMS, Objective
from bert_fast.pretraining.stream import Pack, PackStream

VOCABULARY = TinyVocabulary()

SHARDS = [random_shard(seed) for seed in range(2)]


def packs(count: int, kind: Any = "nsp", **options: Any) -> list[Pack]:
    stream = PackStream(SHARDS, kind, 29, 211, seed=5, **options)
    return list(itertools.islice(stream.packs(), count))


def batch_of(pack: Pack, rate: float = 0.15, seed: int = 1, rule: Masking | None = None) -> PretrainingBatch:
    return batches.mask(*assemble(pack, VOCABULARY), pack.id, VOCABULARY, rate=rate, seed=seed, rule=rule)


@pytest.mark.parametrize("kind", ["nsp", "sop", "full"])
def test_tokens_and_types(kind: Any) -> None:
    """[CLS] a [SEP] b [SEP], types 0 up to the first [SEP] and 1 behind it, positions from 0 on."""
    for pack in packs(7, kind):
        batch, classes = assemble(pack, VOCABULARY)
        assert batch.ids is not None
        assert batch.token_types is not None
        assert len(classes) == len(pack.rows)
        for number, row in enumerate(pack.rows.tolist()):
            begin, end = batch.cu_seqlens[number : number + 2].tolist()
            expected, types = [2], [0]
            for segment, (one, start, length) in enumerate((pack.instances.first[row], pack.instances.second[row])):
                if length:
                    expected += [*pack.shards[one].tokens[start : start + length].tolist(), 3]
                    types += [segment] * (len(expected) - len(types))
            assert batch.ids[begin:end].tolist() == expected
            assert batch.token_types[begin:end].tolist() == types
            assert batch.positions[begin:end].tolist() == list(range(end - begin))


def test_labels() -> None:
    """Where one is predicted the original id stands, and nowhere else; the rows to predict are known."""
    seen = set()
    for pack in packs(20):
        plain, _ = assemble(pack, VOCABULARY)
        batch = batch_of(pack)
        ids, kept, labels = batch.packed.ids, batch.packed.kept, batch.labels[0]
        assert plain.ids is not None
        assert ids is not None
        assert kept is not None
        assert torch.equal((labels != IGNORED).nonzero()[:, 0], kept)
        assert torch.equal(labels[kept], plain.ids[kept])
        assert torch.equal(ids[labels == IGNORED], plain.ids[labels == IGNORED])
        assert (plain.ids[kept] > 4).all()
        assert batch.predicted == len(kept)
        for found, original in zip(ids[kept].tolist(), labels[kept].tolist(), strict=True):
            seen.add("mask" if found == 4 else "same" if found == original else "other")
        assert batch.next_sentence is not None
        assert batch.pairs == len(batch.next_sentence)
    assert seen == {"mask", "same", "other"}


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_masks_are_a_function_of_the_pack(unit: Any) -> None:
    rule = Masking(unit=unit)
    one, other = packs(2)
    assert torch.equal(batch_of(one, rule=rule).labels, batch_of(one, rule=rule).labels)
    assert not torch.equal(batch_of(one, rule=rule).labels, batch_of(one, seed=2, rule=rule).labels)
    same_text = one._replace(id=other.id)
    assert not torch.equal(batch_of(one, rule=rule).labels, batch_of(same_text, rule=rule).labels)


def test_static_duplicates_have_the_same_masks() -> None:
    """Of one duplicate every pass has the same instances and masks, in another order."""
    stream = PackStream(SHARDS, "nsp", 29, 211, seed=5, duplicates=1)
    count = stream.packs_of_pass()
    found = [str(batch_of(pack).packed.ids) for pack in itertools.islice(stream.packs(), 2 * count)]
    assert sorted(found[:count]) == sorted(found[count:])
    assert found[:count] != found[count:]


def test_whole_words() -> None:
    """A word is predicted with all of its pieces or not at all."""
    for pack in packs(9, "full"):
        batch = batch_of(pack, rule=Masking(unit="word"))
        plain, _ = assemble(pack, VOCABULARY)
        assert plain.ids is not None
        words = word_ids(plain.ids.numpy(), VOCABULARY)
        chosen = (batch.labels[0] != IGNORED).numpy()
        assert (words[np.isin(plain.ids.numpy(), VOCABULARY.special_ids)] == -1).all()
        for word in set(words.tolist()) - {-1}:
            assert len(set(chosen[words == word].tolist())) == 1
        assert chosen.any()


@pytest.mark.parametrize("unit", ["token", "word"])
def test_shares_of_ten_million_tokens(unit: Any) -> None:
    """15 % are predicted; of those 80 % masked, 10 % another token, 10 % left: each within five standard deviations."""
    ids = np.random.default_rng(11).integers(5, VOCABULARY.size, 10_500_000)
    bounds = np.arange(0, len(ids), 50)
    one = TinyShard(ids, np.append(bounds, len(ids)), np.arange(0, len(bounds) + 1, 100))
    stream = PackStream([one], "full", 512, 2**19, seed=5)
    counts = dict.fromkeys(("tokens", "predicted", "masked", "left", "other"), 0)
    for pack in itertools.islice(stream.packs(), stream.packs_of_pass()):
        batch = batch_of(pack, rule=Masking(unit=unit))
        kept = batch.packed.kept
        assert kept is not None
        assert batch.packed.ids is not None
        found, original = batch.packed.ids[kept], batch.labels[0, kept]
        is_masked, is_left = found == VOCABULARY.mask_id, found == original
        counts["tokens"] += int((batch.packed.ids != 2).sum() - (batch.packed.ids == 3).sum())
        counts["predicted"] += len(kept)
        counts["masked"] += int(is_masked.sum())
        counts["left"] += int(is_left.sum())
        counts["other"] += int((~is_masked & ~is_left).sum())
    assert counts["tokens"] >= 10**7
    # A random token is the same one now and then; a word's pieces are chosen together, 1.33 at a time.
    same = 0.1 / (VOCABULARY.size - 5)
    spread = 1.5 if unit == "word" else 1.0
    for name, of, share in (
        ("predicted", "tokens", 0.15),
        ("masked", "predicted", 0.8),
        ("left", "predicted", 0.1 + same),
        ("other", "predicted", 0.1 - same),
    ):
        deviation = spread * (share * (1 - share) / counts[of]) ** 0.5
        assert abs(counts[name] / counts[of] - share) <= 5 * deviation, name


def test_one_segment_has_no_pairs() -> None:
    batch = batch_of(packs(1, "full")[0])
    assert batch.next_sentence is None
    assert batch.pairs == 0


# ---- the objective ---------------------------------------------------------------------------------------------------


def model(**options: Any) -> bert_fast.BertForPreTraining:
    config = bert_fast.BertConfig(
        vocab_size=97,
        hidden_size=51,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=67,
        max_position_embeddings=43,
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **options},
    )
    made = bert_fast.BertForPreTraining(config)
    randomise(made)
    return made


@pytest.mark.parametrize("kind", ["nsp", "sop", "full"])
def test_losses_are_transformers(kind: Any, tmp_path: Any) -> None:
    """Sums of losses and their gradients, against the padded batch and means."""
    transformers = pytest.importorskip("transformers")
    ours = model()
    ours.save_pretrained(tmp_path)
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path).train()
    batch = batch_of(packs(1, kind)[0], rate=0.3)
    subject = Objective(ours).train()
    masked, pairs = subject(batch)
    output = theirs(**{name: x for name, x in padded(batch).items() if "label" not in name})
    scores = output.prediction_logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(scores, padded(batch)["labels"].flatten(), reduction="sum")
    expected_pairs = (output.seq_relationship_logits * 0).sum()
    if batch.next_sentence is not None:
        expected_pairs = torch.nn.functional.cross_entropy(
            output.seq_relationship_logits, batch.next_sentence, reduction="sum"
        )
    assert_near(masked, expected)
    assert_near(pairs, expected_pairs)
    found = gradients(ours, masked / batch.predicted + pairs / max(batch.pairs, 1))
    names = {bert_fast.checkpoint.to_hugging_face(name): name for name in found}
    reference = gradients(theirs, expected / batch.predicted + expected_pairs / max(batch.pairs, 1))
    assert_same_gradients(found, {names[name]: x for name, x in reference.items() if name in names})


@pytest.mark.parametrize("kind", ["nsp", "full"])
def test_judgement(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, right answers and their numbers, chunk by chunk, against the logits of everything."""
    monkeypatch.setattr(objective, "ROWS", 7)
    ours = model()
    subject = Objective(ours).eval()
    batch = batch_of(packs(1, kind)[0], rate=0.5)
    with torch.no_grad():
        found = dict(zip(SUMS, subject(batch, is_judged=True)[0].tolist(), strict=True))
        output = ours(batch.packed, labels=batch.labels, next_sentence_label=batch.next_sentence)
    targets = batch.labels[batch.labels != IGNORED]
    assert found["predicted"] == batch.predicted == len(targets)
    assert found["masked_lm_loss"] == pytest.approx(float(output.masked_lm_loss) * len(targets), rel=1e-5)
    assert found["masked_lm_correct"] == int((output.logits.argmax(-1) == targets).sum())
    assert found["pairs"] == batch.pairs
    if batch.next_sentence is not None:
        assert found["next_sentence_loss"] == pytest.approx(float(output.next_sentence_loss) * batch.pairs, rel=1e-5)
        answers = output.next_sentence_logits.argmax(-1)
        assert found["next_sentence_correct"] == int((answers == batch.next_sentence).sum())
        assert set(batch.next_sentence.tolist()) <= {IS_NEXT, IS_OTHER, IGNORED}


def test_every_parameter_gets_a_gradient() -> None:
    """Also without pairs, for processes wait for each."""
    subject = Objective(model())
    masked, pairs = subject(batch_of(packs(1, "full")[0]))
    (masked + pairs).backward()
    assert all(parameter.grad is not None for parameter in subject.parameters())


def test_nothing_to_predict() -> None:
    subject = Objective(model())
    masked, _ = subject(batch_of(packs(1)[0], rate=0.0))
    assert masked.item() == 0.0


def test_checkpointed_activations() -> None:
    """The same gradients, dropout included, from activations that are computed twice."""
    batch = batch_of(packs(1)[0])
    results = []
    for is_checkpointed in (False, True):
        ours = model(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        if is_checkpointed:
            objective.checkpoint_activations(ours)
        torch.manual_seed(3)
        results.append(gradients(ours, sum(Objective(ours)(batch))))
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name

"""Checkpoints: transformers' into ours, ours into transformers', and what is refused."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    HEADS,
    MIXED,
    SIZES,
    assert_near,
    inputs,
    mask_of,
    minilm,
    one_thread,  # noqa: F401
    ours,
    randomise,
    theirs,
    transformers,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import bert_fast
from bert_fast import checkpoint

CLASSES = ("BertModel", *HEADS)
TIED = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")


def make(name: str, seed: int = 0, **arguments: Any) -> Any:
    """Ours, tiny, with random weights, in evaluation mode."""
    model = getattr(bert_fast, name)(bert_fast.BertConfig(**SIZES), **arguments)
    randomise(model, seed)
    return model.eval()


def load(name: str, path: Path | str, **arguments: Any) -> Any:
    return getattr(bert_fast, name).from_pretrained(path, **arguments)


def reload(name: str, path: Path) -> Any:
    """transformers' model of a folder, which has to fit exactly."""
    model, info = getattr(transformers, name).from_pretrained(path, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


def batch_for(name: str) -> dict[str, Tensor]:
    batch = inputs(mask_of(MIXED))
    return {key: x.view(4, 2, 13) for key, x in batch.items()} if name == "BertForMultipleChoice" else batch


def assert_same_weights(model: Any, weights: dict[str, Tensor]) -> None:
    """Bit by bit, under transformers' names."""
    state = {str(checkpoint.to_hugging_face(name)): value for name, value in model.state_dict().items()}
    assert state.keys() == weights.keys() - set(TIED)
    for name, value in state.items():
        assert value.dtype == weights[name].dtype, name
        assert torch.equal(value, weights[name]), name


def assert_same_answers(name: str, found: Any, expected: Any) -> None:
    """Ours and transformers' on a batch with every kind of padding, at the tokens."""
    batch, mask = batch_for(name), mask_of(MIXED)
    one, other = found(**batch), expected(**batch)
    if name == "BertModel":
        assert_near(one.last_hidden_state[mask], other.last_hidden_state[mask])
        assert_near(one.pooled, other.pooler_output)
    elif name == "BertForQuestionAnswering":
        assert_near(one.logits[0][mask], other.start_logits[mask])
        assert_near(one.logits[1][mask], other.end_logits[mask])
    elif name in ("BertForMaskedLM", "BertForTokenClassification"):
        assert_near(one.logits[mask], other.logits[mask])
    elif name == "BertForPreTraining":
        assert_near(one.logits[mask], other.prediction_logits[mask])
        assert_near(one.next_sentence_logits, other.seq_relationship_logits)
    else:
        assert_near(one.logits, other.logits)


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_names(name: str) -> None:
    our_names = list(make(name).state_dict())
    their_names = [key for key in theirs(name).state_dict() if key not in TIED]
    assert sorted(str(checkpoint.to_hugging_face(key)) for key in our_names) == sorted(their_names)
    assert sorted(str(checkpoint.to_ours(key)) for key in their_names) == sorted(our_names)
    for key in our_names:
        assert checkpoint.to_ours(str(checkpoint.to_hugging_face(key))) == key
    for key in their_names:
        assert checkpoint.to_hugging_face(str(checkpoint.to_ours(key))) == key


def test_layer_numbers() -> None:
    for number in (0, 9, 10, 123):
        theirs_name = f"bert.encoder.layer.{number}.attention.output.LayerNorm.bias"
        assert checkpoint.to_ours(theirs_name) == f"bert.layers.{number}.attention_norm.bias"
        assert checkpoint.to_hugging_face(f"bert.layers.{number}.attention_norm.bias") == theirs_name


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.position_ids",
        "bert.embeddings.token_type_ids",
        "encoder.layer.x.output.dense.weight",
        "encoder.layer.0.crossattention.self.query.weight",
        "roberta.embeddings.word_embeddings.weight",
        "xclassifier.weight",
        "classifier.out_proj.weight",
        "layers.0.query.weight",
        "",
    ],
)
def test_unknown_names(name: str) -> None:
    assert checkpoint.to_ours(name) is None


@pytest.mark.parametrize("name", ["encoder.layer.0.output.dense.weight", "pooler.dense.weight", "layers..query", ""])
def test_unknown_names_of_ours(name: str) -> None:
    assert checkpoint.to_hugging_face(name) is None


# ---- ours to transformers' -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_loads_ours(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = reload(name, tmp_path)
    assert loaded.config.architectures == [name]
    assert_same_weights(model, loaded.state_dict())
    assert_same_answers(name, model, loaded)


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_transformers_loads_our_classes(name: str, num_labels: int, tmp_path: Path) -> None:
    model = make(name, num_labels=num_labels)
    model.save_pretrained(tmp_path)
    loaded = reload(name, tmp_path)
    assert loaded.config.num_labels == num_labels
    assert_same_answers(name, model, loaded)


def test_transformers_loads_ours_without_pooler(tmp_path: Path) -> None:
    model = make("BertModel", has_pooler=False)
    model.save_pretrained(str(tmp_path))
    loaded = transformers.BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert_same_weights(model, loaded.state_dict())


def test_auto_model(tmp_path: Path) -> None:
    make("BertForMaskedLM").save_pretrained(tmp_path)
    assert type(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)) is transformers.BertForMaskedLM


def test_halves(tmp_path: Path) -> None:
    model = make("BertForMaskedLM").bfloat16()
    model.save_pretrained(tmp_path)
    assert_same_weights(model, reload("BertForMaskedLM", tmp_path).state_dict())
    widened = {name: value.float() for name, value in load_file(tmp_path / "model.safetensors").items()}
    assert_same_weights(load("BertForMaskedLM", tmp_path), widened)


# ---- transformers' to ours -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_ours_loads_transformers(name: str, tmp_path: Path) -> None:
    model = theirs(name, num_labels=2 if name == "BertForQuestionAnswering" else 3)
    model.save_pretrained(tmp_path)
    loaded = load(name, tmp_path).eval()
    assert_same_weights(loaded, model.state_dict())
    assert_same_answers(name, loaded, model)


@pytest.mark.parametrize("name", CLASSES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = make(name)
    for folder in ("once", "twice"):
        model.save_pretrained(tmp_path / "deep" / folder)
        model = load(name, str(tmp_path / "deep" / folder))
    for file in ("model.safetensors", "config.json"):
        once, twice = ((tmp_path / "deep" / folder / file).read_bytes() for folder in ("once", "twice"))
        assert once == twice
    assert_same_weights(model, load_file(tmp_path / "deep" / "once" / "model.safetensors"))
    assert model.config == bert_fast.BertConfig(**SIZES)


def test_config_survives(tmp_path: Path) -> None:
    config = bert_fast.BertConfig(
        **SIZES,
        hidden_act="gelu_new",
        hidden_dropout_prob=0.23,
        attention_probs_dropout_prob=0.29,
        classifier_dropout=0.37,
        initializer_range=0.031,
        layer_norm_eps=1e-7,
        pad_token_id=3,
    )
    bert_fast.BertModel(config).save_pretrained(tmp_path)
    assert bert_fast.BertConfig.from_pretrained(tmp_path) == config
    read = transformers.BertConfig.from_pretrained(tmp_path)
    for name, value in config.to_dict().items():
        assert getattr(read, name) == value, name


def test_minilm() -> None:
    model = load("BertModel", minilm()).eval()
    weights = load_file(minilm() / "model.safetensors")
    del weights["embeddings.position_ids"]  # a buffer that was saved once
    assert_same_weights(model, weights)
    expected = reload("BertModel", minilm())
    mask = mask_of(MIXED)
    batch = {**inputs(mask), "token_type_ids": mask.long()}
    found, other = model(**batch), expected(**batch)
    assert_near(found.last_hidden_state[mask], other.last_hidden_state[mask])
    assert_near(found.pooled, other.pooler_output)


def test_minilm_round_trip(tmp_path: Path) -> None:
    load("BertModel", minilm()).save_pretrained(tmp_path)
    original, copy = load_file(minilm() / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert copy.keys() == original.keys() - {"embeddings.position_ids"}
    for name, value in copy.items():
        assert torch.equal(value, original[name]), name
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def as_shards(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert not (folder / "model.safetensors").exists()


def as_pickle(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def as_pickle_shards(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    state = list(model.state_dict().items())
    places: dict[str, str] = {}
    for number, part in enumerate((state[::2], state[1::2])):
        torch.save(dict(part), folder / f"pytorch_model-{number}.bin")
        places |= {name: f"pytorch_model-{number}.bin" for name, _ in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


def as_old_names(model: Any, folder: Path) -> None:
    """As converted from TensorFlow: gamma and beta, and a buffer that was saved once."""
    model.config.save_pretrained(folder)
    state = {"bert.embeddings.position_ids": torch.arange(37)[None]}
    for name, value in model.state_dict().items():
        if name not in TIED:
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            state[old] = value.clone()
    assert any(name.endswith("gamma") for name in state)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("write", [as_shards, as_pickle, as_pickle_shards, as_old_names])
def test_files(write: Callable[[Any, Path], None], tmp_path: Path) -> None:
    model = theirs("BertForPreTraining")
    write(model, tmp_path)
    loaded = load("BertForPreTraining", tmp_path).eval()
    assert_same_weights(loaded, model.state_dict())
    assert_same_answers("BertForPreTraining", loaded, model)


def test_safetensors_before_pickle(tmp_path: Path) -> None:
    model = theirs("BertModel", seed=1)
    model.save_pretrained(tmp_path)
    as_pickle(theirs("BertModel", seed=2), tmp_path)
    assert_same_weights(load("BertModel", tmp_path), model.state_dict())


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickle_runs_no_code(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    theirs("BertModel").config.save_pretrained(tmp_path)
    torch.save({"embeddings.word_embeddings.weight": Evil(witness)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        load("BertModel", tmp_path)
    assert not witness.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert witness.exists(), "the pickle does nothing at all"


# ---- with and without the prefix -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["BertModel", "BertForPreTraining"])
@pytest.mark.parametrize("target", ["BertModel", "BertForNextSentencePrediction"])
def test_prefix(source: str, target: str, tmp_path: Path) -> None:
    model = theirs(source)
    model.save_pretrained(tmp_path)
    if (source, target) == ("BertModel", "BertForNextSentencePrediction"):
        with pytest.warns(UserWarning, match=r"not in the checkpoint: cls\.seq_relationship\.bias, cls\.seq_rel"):
            loaded = load(target, tmp_path)
    else:
        loaded = load(target, tmp_path)
    encoder = loaded if target == "BertModel" else loaded.bert
    expected = model if source == "BertModel" else model.bert
    assert_same_weights(encoder, expected.state_dict())
    if source == "BertForPreTraining" and target != "BertModel":
        assert torch.equal(loaded.nsp.weight, model.cls.seq_relationship.weight)


def test_head_without_prefix(tmp_path: Path) -> None:
    # A head beside an encoder whose names carry no prefix.
    model = theirs("BertForMaskedLM")
    model.config.save_pretrained(tmp_path)
    state = {name.removeprefix("bert."): x.clone() for name, x in model.state_dict().items() if name not in TIED}
    save_file(state, tmp_path / "model.safetensors")
    assert_same_weights(load("BertForMaskedLM", tmp_path), model.state_dict())


@pytest.mark.parametrize("source", ["BertForMaskedLM", "BertForNextSentencePrediction"])
def test_pooler_comes_from_the_checkpoint(source: str, tmp_path: Path) -> None:
    theirs(source).save_pretrained(tmp_path)
    assert (load("BertModel", tmp_path).pooler is None) == (source == "BertForMaskedLM")


# ---- what is missing or does not fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "lacking"),
    [
        ("BertModel", "BertForSequenceClassification", ["classifier.bias", "classifier.weight"]),
        ("BertModel", "BertForQuestionAnswering", ["qa_outputs.bias", "qa_outputs.weight"]),
        (
            "BertForMaskedLM",
            "BertForSequenceClassification",
            ["bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"],
        ),
    ],
)
def test_missing_head(source: str, target: str, lacking: list[str], tmp_path: Path) -> None:
    theirs(source).save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match=re.escape(f"newly initialised, not in the checkpoint: {', '.join(lacking)}")
    ) as w:
        loaded = load(target, tmp_path, num_labels=4)
    assert [Path(warning.filename).name for warning in w] == ["test_checkpoint.py"]
    if target == "BertForSequenceClassification":
        assert loaded.classifier.weight.shape == (4, 51)
        assert float(loaded.classifier.weight.detach().std()) > 0.01


def saved(name: str, folder: Path, change: Callable[[dict[str, Tensor]], object], **config: Any) -> Path:
    """A checkpoint of transformers' whose tensors were tampered with."""
    model = theirs(name, **config)
    model.config.save_pretrained(folder)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    change(state)
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "lacking", ["bert.embeddings.LayerNorm.bias", "bert.encoder.layer.1.attention.self.value.weight"]
)
def test_missing_encoder_weight(lacking: str, tmp_path: Path) -> None:
    folder = saved("BertForMaskedLM", tmp_path, lambda state: state.pop(lacking))
    with pytest.raises(ValueError, match=f"lacks {re.escape(lacking)}$"):
        load("BertForMaskedLM", folder)


def test_missing_layer(tmp_path: Path) -> None:
    folder = saved("BertModel", tmp_path, dict.copy)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"encoder\.layer\.2\.output\.dense\.weight"):
        load("BertModel", folder)


@pytest.mark.parametrize(
    ("name", "shape"), [("embeddings.word_embeddings.weight", (98, 51)), ("encoder.layer.0.output.dense.bias", (50,))]
)
def test_wrong_shape(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    folder = saved("BertModel", tmp_path, lambda state: state.update({name: torch.zeros(shape)}))
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        load("BertModel", folder)
    assert str(shape) in str(caught.value)
    assert str((97, 51) if shape == (98, 51) else (51,)) in str(caught.value)


def test_wrong_number_of_labels(tmp_path: Path) -> None:
    theirs("BertForTokenClassification", num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier\.(weight|bias).*3.*4"):
        load("BertForTokenClassification", tmp_path, num_labels=4)


@pytest.mark.parametrize("prefix", ["bert.", ""])
@pytest.mark.parametrize("name", ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"])
def test_untied_decoder(name: str, prefix: str, tmp_path: Path) -> None:
    # transformers multiplies with the decoder's own weight and adds the decoder's own bias.
    def untie(state: dict[str, Tensor]) -> None:
        state["cls.predictions.decoder.weight"].copy_(state["bert.embeddings.word_embeddings.weight"])
        state["cls.predictions.decoder.bias"].copy_(state["cls.predictions.bias"])
        state[name] += 1
        for key in list(state):
            state[key.replace("bert.", prefix)] = state.pop(key)

    folder = saved("BertForMaskedLM", tmp_path, untie, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=re.escape(name)):
        load("BertForMaskedLM", folder)


def test_untied_decoder_does_not_matter_without_it(tmp_path: Path) -> None:
    model = theirs("BertForPreTraining", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    assert_same_weights(load("BertModel", tmp_path), model.bert.state_dict())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"is_decoder": True, "add_cross_attention": True}, "is_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"num_attention_heads": 4}, "hidden_size is 51 and num_attention_heads is 4"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob is 1\.0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"pad_token_id": 97}, "pad_token_id is 97"),
    ],
)
def test_other_architectures(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved("BertModel", tmp_path, dict.copy)
    before = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**before, **values}))
    with pytest.raises(ValueError, match=message):
        load("BertModel", folder)


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors", "folder"])
def test_missing_file(lacking: str, tmp_path: Path) -> None:
    folder = saved("BertModel", tmp_path, dict.copy)
    if lacking == "folder":
        folder = folder / "nowhere"
    else:
        (folder / lacking).unlink()
    for name in ("BertModel", "BertForMaskedLM"):
        with pytest.raises(FileNotFoundError, match=re.escape(str(folder))):
            load(name, folder)


def test_missing_shard(tmp_path: Path) -> None:
    as_shards(theirs("BertModel"), tmp_path)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError):
        load("BertModel", tmp_path)


# ---- a file appears whole or not at all ------------------------------------------------------------------------------


class DiskFullError(OSError):
    pass


@pytest.mark.parametrize("has_old", [False, True])
def test_failing_weights(has_old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if has_old:
        make("BertModel", seed=1).save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def write_half(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
        save_file(dict(list(tensors.items())[:3]), path)
        raise DiskFullError

    monkeypatch.setattr(checkpoint, "save_file", write_half)
    with pytest.raises(DiskFullError):
        make("BertModel", seed=2).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_failing_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("BertModel", seed=1).save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()

    def write_half(self: Path, text: str, **_: Any) -> None:
        self.write_bytes(text.encode()[: len(text) // 2])
        raise DiskFullError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_half)
        with pytest.raises(DiskFullError):
            make("BertModel", seed=2).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    load("BertModel", tmp_path)


def test_save_over_old(tmp_path: Path) -> None:
    make("BertForMaskedLM", seed=1).save_pretrained(tmp_path)
    model = make("BertForMaskedLM", seed=2)
    model.save_pretrained(tmp_path)
    assert_same_weights(load("BertForMaskedLM", tmp_path), load_file(tmp_path / "model.safetensors"))
    loaded = load("BertForMaskedLM", tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_load_over_trained() -> None:
    # Loading copies into the parameters that an optimiser may hold.
    model, source = make("BertModel", seed=1), theirs("BertModel", seed=2)
    parameters = list(model.parameters())
    checkpoint.apply(model, source.state_dict())
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert_same_weights(model, source.state_dict())
    assert_same_answers("BertModel", model, source)
    assert ours(source).config == model.config

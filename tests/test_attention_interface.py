"""attn_implementation="bert_fast": transformers' models with another attention, beside eager and sdpa."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from models import (
    MIXED,
    SIZES,
    WHOLE,
    assert_near,
    assert_same_gradients,
    gradients,
    inputs,
    mask_of,
    one_thread,  # noqa: F401
    randomise,
    theirs,
    transformers,
)
from tolerance import magnitude
from torch import Tensor, nn

import bert_fast
from bert_fast import functional
from bert_fast.swap import attention_interface
from bert_fast.swap.attention_interface import PaddingMask

NAME = "bert_fast"

FULL = "1111111111111\n" * 4
RIGHT = "1111111111111\n1111111000000\n1000000000000\n1111111111100\n"
LEFT = "1111111111111\n0001111111111\n0000000000001\n0111111111111\n"
HOLES = "1101100111010\n0011011101000\n1010101010101\n1000000000001\n"
EMPTY = "1111100000000\n0000000000000\n1111111111111\n0000000000000\n"
MASKS = {"full": FULL, "right": RIGHT, "left": LEFT, "holes": HOLES, "empty": EMPTY, "mixed": MIXED}

BERT = {key: value for key, value in SIZES.items() if key != "type_vocab_size"}
ROTARY = {**BERT, "hidden_size": 66}  # 22 to a head: rotations turn pairs
ROBERTA = {**BERT, "max_position_embeddings": 41, "pad_token_id": 1}
DECODER = {**ROTARY, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**DECODER, "hidden_size": 88, "num_attention_heads": 4, "num_key_value_heads": 2, "mask_token_id": 3}
BART = {
    "vocab_size": 97,
    "d_model": 51,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 71,
    "decoder_ffn_dim": 73,
    "max_position_embeddings": 41,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
T5 = {
    "vocab_size": 97,
    "d_model": 51,
    "d_kv": 17,
    "d_ff": 71,
    "num_layers": 2,
    "num_heads": 3,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


class Kind(NamedTuple):
    """
    Attributes:
        name: of the class.
        config: of the model.
        served: attentions of one call that go without padding.
        rest: those that are left to sdpa.
    """

    name: str
    config: dict[str, Any]
    served: int = 2
    rest: int = 0

    def __str__(self) -> str:
        return self.name

    def build(self) -> Any:
        cls = getattr(transformers, self.name)
        config = cls.config_class(**{**self.config, "attention_dropout": 0.0})
        model = cls(config)
        randomise(model)
        return model.eval()


ENCODERS = [
    Kind("BertModel", BERT),
    Kind("AlbertModel", {**BERT, "embedding_size": 31}),
    Kind("ErnieModel", BERT),
    Kind("RobertaForMaskedLM", ROBERTA),
    Kind("DistilBertModel", {"vocab_size": 97, "dim": 51, "n_heads": 3, "n_layers": 2, "hidden_dim": 71}),
    Kind("EsmModel", {**ROBERTA, "mask_token_id": 3, "position_embedding_type": "absolute"}),
    Kind("NomicBertModel", ROTARY),
    Kind("GteModel", ROTARY),
    Kind("EuroBertModel", GROUPED),  # a key head for two queries' heads
    # Its second layer has a window of 3 to either side.
    Kind("ModernBertModel", {**DECODER, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2}, 1, 1),
    Kind("ModernBertModel", {**DECODER, "local_attention": 40, "cls_token_id": 1, "sep_token_id": 2}, 1, 1),
    Kind("RemBertModel", {**BERT, "input_embedding_size": 31}, 0),  # has an attention of its own
    Kind("MegatronBertModel", BERT, 0),
]

DECODERS = [
    Kind("LlamaForCausalLM", DECODER, 0, 2),
    Kind("MistralForCausalLM", {**DECODER, "sliding_window": 5, "head_dim": 22}, 0, 2),
    Kind("GPT2LMHeadModel", {**BERT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, 0, 2),
    Kind("BertLMHeadModel", {**BERT, "is_decoder": True}, 0, 2),
    Kind(
        "XGLMForCausalLM",
        {"vocab_size": 97, "d_model": 51, "attention_heads": 3, "ffn_dim": 71, "num_layers": 2, "pad_token_id": 1},
        0,
    ),
]

# In cross-attention a padding mask hides the source's tokens alone, and the target is just as long as the source here.
TRANSLATORS = [
    Kind("BartForConditionalGeneration", BART, 2, 4),
    Kind("MarianMTModel", BART, 2, 4),
    Kind("T5ForConditionalGeneration", T5, 0, 6),
]


def beside(kinds: list[Kind]) -> list[Any]:
    """Each kind with each implementation of attention that it has."""
    return [
        pytest.param(kind, implementation, id=f"{kind}-{implementation}")
        for kind in kinds
        for implementation in ("eager", "sdpa")
        if implementation == "eager" or kind.served + kind.rest > 0
    ]


each_encoder = pytest.mark.parametrize("kind", ENCODERS, ids=str)
each_decoder = pytest.mark.parametrize("kind", DECODERS, ids=str)
each_translator = pytest.mark.parametrize("kind", TRANSLATORS, ids=str)

pytestmark = pytest.mark.filterwarnings("ignore:.*`torch.jit.* is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _registered() -> None:
    bert_fast.register_attention()


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often attention went without padding, how often through sdpa, and how often a batch was packed."""
    counts: Counter[str] = Counter()

    def counted(owner: Any, name: str, path: str) -> None:
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[path] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(functional, "attention", "served")
    counted(attention_interface, "_sdpa", "rest")
    counted(attention_interface, "unpad", "packed")
    return counts


def pair(kind: Kind, implementation: str = "eager") -> tuple[Any, Any]:
    """The model as it is, and its copy with our attention."""
    model = kind.build()
    twin = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    with_ours(twin)
    return model, twin


def with_ours(model: Any) -> None:
    """As set_attn_implementation, also where transformers only warns since the model has an attention of its own."""
    if model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)
    else:
        model.config._attn_implementation = NAME


def batch_for(mask: Tensor, seed: int = 1) -> dict[str, Tensor]:
    ids = torch.randint(4, 97, mask.shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": mask.long()}


def states(output: Any) -> Tensor:
    tensor = output[0]
    assert isinstance(tensor, Tensor)
    return tensor


# ---- encoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "implementation"), beside(ENCODERS))
def test_encoder(kind: Kind, implementation: str, paths: Counter[str]) -> None:
    model, twin = pair(kind, implementation)
    mask = mask_of(MIXED)
    batch = batch_for(mask)
    expected, found = states(model(**batch)), states(twin(**batch))
    assert_near(found[mask], expected[mask])
    assert (paths["served"], paths["rest"]) == (kind.served, kind.rest)
    assert paths["packed"] == 1
    assert magnitude(expected[mask]) > 1.0
    # The mask counts, and so does its place.
    assert magnitude(states(twin(batch["input_ids"]))[mask] - found[mask]) > 0.01


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_masks(rows: str, dtype: torch.dtype, paths: Counter[str]) -> None:
    model, twin = pair(ENCODERS[0], "sdpa")
    mask = mask_of(rows)
    batch = {**batch_for(mask), "attention_mask": mask.to(dtype)}
    for has_grad in (True, False):
        with torch.set_grad_enabled(has_grad):
            found, expected = states(twin(**batch)), states(model(**batch))
        assert found.isfinite().all()
        assert_near(found[mask], expected[mask])
    assert paths == {"served": 4, "packed": 2}


@pytest.mark.parametrize("kind", [ENCODERS[0], ENCODERS[1], ENCODERS[8]], ids=str)
def test_no_mask(kind: Kind, paths: Counter[str]) -> None:
    model, twin = pair(kind, "sdpa")
    ids = batch_for(mask_of(WHOLE))["input_ids"]
    assert_near(states(twin(ids)), states(model(ids)))
    assert paths == {"served": 2, "packed": 1}


@each_encoder
def test_gradients(kind: Kind, paths: Counter[str]) -> None:
    model, twin = pair(kind)
    mask = mask_of(HOLES)
    batch = batch_for(mask)
    # Of squares no sum over a LayerNorm's row is a constant.
    found, expected = (gradients(each, states(each(**batch))[mask].square().mean() * 7) for each in (twin, model))
    assert_same_gradients(found, expected)
    assert paths["served"] == kind.served


@pytest.mark.parametrize("rows", [RIGHT, FULL], ids=["right", "full"])
def test_classifier(rows: str, paths: Counter[str]) -> None:
    model, twin = pair(Kind("RobertaForSequenceClassification", {**ROBERTA, "num_labels": 3}))
    batch = {**batch_for(mask_of(rows)), "labels": torch.tensor([2, 0, 1, -100])}
    expected, found = model(**batch), twin(**batch)
    assert_near(found.loss, expected.loss)
    assert_near(found.logits, expected.logits)
    assert_same_gradients(gradients(twin, found.loss), gradients(model, expected.loss))
    assert paths == {"served": 2, "packed": 1}


def test_masked_language_model() -> None:
    model, twin = pair(ENCODERS[3])
    mask = mask_of(MIXED)
    batch = batch_for(mask)
    batch["labels"] = batch["input_ids"].flip(1).masked_fill(~mask, -100)
    expected, found = model(**batch), twin(**batch)
    assert_near(found.loss, expected.loss)
    assert_same_gradients(gradients(twin, found.loss), gradients(model, expected.loss))


def test_images(paths: Counter[str]) -> None:
    model, twin = pair(
        Kind(
            "ViTModel",
            {
                "hidden_size": 51,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "intermediate_size": 71,
                "image_size": 15,
                "patch_size": 5,
            },
        )
    )
    pixels = torch.randn(3, 3, 15, 15, generator=torch.Generator().manual_seed(1))
    expected, found = states(model(pixels)), states(twin(pixels))
    assert_near(found, expected)
    assert paths["served"] == 2
    assert_same_gradients(gradients(twin, found.square().mean()), gradients(model, expected.square().mean()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_without_a_kernel(dtype: torch.dtype, paths: Counter[str]) -> None:
    model, twin = (each.to(dtype) for each in pair(ENCODERS[0], "sdpa"))
    mask = mask_of(HOLES)
    batch = batch_for(mask)
    assert_near(states(twin(**batch))[mask], states(model(**batch))[mask], 0.0)
    assert paths == {"rest": 2, "packed": 1}


def test_wide_heads(paths: Counter[str]) -> None:
    model, twin = pair(Kind("BertModel", {**BERT, "hidden_size": 3 * 131}), "sdpa")
    mask = mask_of(HOLES)
    batch = batch_for(mask)
    assert_near(states(twin(**batch))[mask], states(model(**batch))[mask])
    assert paths["rest"] == 2


def test_autocast(paths: Counter[str]) -> None:
    model, twin = pair(ENCODERS[0], "sdpa")
    mask = mask_of(HOLES)
    batch = batch_for(mask)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = states(twin(**batch)), states(model(**batch))
    assert_near(found[mask], expected[mask], 0.02)
    assert paths["rest"] == 2


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
@pytest.mark.parametrize("has_mask", [True, False])
def test_small_batches(shape: tuple[int, int], has_mask: bool) -> None:
    """Of the function: transformers' layers take no empty batch."""
    rows, length = shape
    mask = attention_interface.attention_mask(
        batch_size=rows,
        q_length=length,
        kv_length=length,
        mask_function=transformers.masking_utils.bidirectional_mask_function,
        attention_mask=torch.ones(shape, dtype=torch.bool) if has_mask else None,
    )
    x = torch.randn(rows, 3, length, 17, requires_grad=True)
    for has_grad in (True, False):
        with torch.set_grad_enabled(has_grad):
            assert attention_interface.attention(nn.Module(), x, x, x, mask)[0].shape == (rows, length, 3, 17)


def test_nothing_but_padding() -> None:
    _, twin = pair(ENCODERS[0])
    output = twin(**batch_for(torch.zeros(3, 5, dtype=torch.bool)))[0]
    assert output.isfinite().all()
    output.sum().backward()


# ---- what is not served ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [FULL, RIGHT, LEFT], ids=["full", "right", "left"])
@pytest.mark.parametrize(("kind", "implementation"), beside(DECODERS))
def test_decoder(kind: Kind, rows: str, implementation: str, paths: Counter[str]) -> None:
    model, twin = pair(kind, implementation)
    mask = mask_of(rows)
    batch = batch_for(mask)
    batch["labels"] = batch["input_ids"].masked_fill(~mask | ~mask.roll(1, 1), -100)
    expected, found = model(**batch), twin(**batch)
    assert_near(found.logits[mask], expected.logits[mask])
    assert_near(found.loss, expected.loss)
    assert paths == ({"rest": kind.rest} if kind.rest else {})
    if rows != LEFT:  # there the first tokens see nothing, which eager and sdpa take in other ways
        assert_same_gradients(gradients(twin, found.loss), gradients(model, expected.loss))


@pytest.mark.parametrize("rows", [FULL, LEFT], ids=["full", "left"])
@each_decoder
def test_generate(kind: Kind, rows: str) -> None:
    model, twin = pair(kind, "sdpa" if kind.rest else "eager")
    batch = batch_for(mask_of(rows))
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": 96}
    assert torch.equal(twin.generate(**batch, **options), model.generate(**batch, **options))


def translation(mask: Tensor) -> dict[str, Tensor]:
    batch = batch_for(mask)
    target = batch_for(mask, seed=2)["input_ids"]
    return {**batch, "decoder_input_ids": target, "labels": target.roll(-1, 1)}


@pytest.mark.parametrize("rows", [FULL, HOLES], ids=["full", "holes"])
@each_translator
def test_translator(kind: Kind, rows: str, paths: Counter[str]) -> None:
    model, twin = pair(kind)
    mask = mask_of(rows)
    batch = translation(mask)
    expected, found = model(**batch), twin(**batch)
    assert_near(found.encoder_last_hidden_state[mask], expected.encoder_last_hidden_state[mask])
    assert_near(found.logits, expected.logits)
    assert_near(found.loss, expected.loss)
    is_full = rows == FULL  # cross-attention to a whole text is served, since no query is hidden
    assert paths["served"] == kind.served + (2 if is_full and kind.served else 0)
    assert_same_gradients(gradients(twin, found.loss), gradients(model, expected.loss))


@each_translator
def test_generate_translation(kind: Kind) -> None:
    model, twin = pair(kind)
    batch = batch_for(mask_of(HOLES))
    options = {"max_new_tokens": 13, "do_sample": False, "num_beams": 2}
    assert torch.equal(twin.generate(**batch, **options), model.generate(**batch, **options))


def test_cross_attention_of_bert(paths: Counter[str]) -> None:
    model, twin = pair(Kind("BertLMHeadModel", {**BERT, "is_decoder": True, "add_cross_attention": True}))
    mask = mask_of(HOLES)
    batch = {
        "input_ids": batch_for(mask)["input_ids"],
        "encoder_hidden_states": torch.randn(4, 13, 51, generator=torch.Generator().manual_seed(2)),
        "encoder_attention_mask": mask.long(),
    }
    assert_near(states(twin(**batch)), states(model(**batch)))
    assert paths["served"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoder_that_looks_ahead(dtype: torch.dtype, paths: Counter[str]) -> None:
    """Its modules call themselves causal, and an sdpa without a mask believes them."""
    model, twin = (each.to(dtype) for each in pair(Kind("LlamaModel", {**GROUPED, "is_causal": False})))
    for rows in (FULL, HOLES):
        mask = mask_of(rows)
        batch = {**batch_for(mask), "use_cache": False}
        assert_near(states(twin(**batch))[mask], states(model(**batch))[mask])
    assert paths["served" if dtype == torch.float32 else "rest"] == 4


def causal_masks(mask: Tensor) -> Tensor:
    return mask[:, None, None, :] & torch.ones(13, 13, dtype=torch.bool).tril()


OWN_MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "causal": causal_masks,
    "padding": lambda mask: mask[:, None, None, :],
    "expanded": lambda mask: mask[:, None, None, :].expand(-1, 1, 13, 13),
    "numbers": lambda mask: torch.where(causal_masks(mask), 0.5, -30.0),
}


@pytest.mark.parametrize("name", OWN_MASKS)
def test_masks_in_four_dimensions(name: str, paths: Counter[str]) -> None:
    model, twin = pair(ENCODERS[0], "sdpa")
    batch = batch_for(mask_of(RIGHT))
    batch["attention_mask"] = OWN_MASKS[name](mask_of(RIGHT))
    assert_near(states(twin(**batch)), states(model(**batch)), 0.0)
    assert paths == {"rest": 2}


def call_arguments(heads: int = 3, length: int = 5) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    model, _ = pair(ENCODERS[0])
    q, k, v = torch.randn(3, 2, heads, length, 17, generator=torch.Generator().manual_seed(1)).unbind()
    return model.encoder.layer[0].attention.self, q, k, v


@pytest.mark.parametrize("name", ["s_aux", "sinks", "indices", "block_indices"])
def test_what_sdpa_would_overlook(name: str) -> None:
    module, q, k, v = call_arguments()
    extra: dict[str, Any] = {name: torch.ones(3)}
    with pytest.raises(ValueError, match=f"{name} is given to BertSelfAttention"):
        attention_interface.attention(module, q, k, v, None, **extra)


def test_softcap() -> None:
    kind = Kind("Gemma2Model", {**DECODER, "head_dim": 22, "sliding_window": 5})
    with pytest.raises(ValueError, match="softcap"):
        pair(kind)[1](**batch_for(mask_of(RIGHT)))


@pytest.mark.parametrize("scaling", [None, 0.37])
@pytest.mark.parametrize("is_causal", [True, False, None])
def test_call_without_mask(scaling: float | None, is_causal: bool | None, paths: Counter[str]) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module, q, k, v = call_arguments()
    options: dict[str, Any] = {"scaling": scaling, "is_causal": is_causal}
    found, nothing = attention_interface.attention(module, q, k, v, None, **options)
    assert nothing is None
    assert_near(found, sdpa_attention_forward(module, q, k, v, None, **options)[0])
    assert paths["served"] == (0 if is_causal else 1)


def test_whole_batch_of_a_causal_module(paths: Counter[str]) -> None:
    """A mask that hides nothing is none for sdpa, which would then go by the module."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module: Any
    module, *tensors = call_arguments()
    module.is_causal = True
    q, k, v = (x.double() for x in tensors)
    mask = attention_interface.attention_mask(
        batch_size=2,
        q_length=5,
        kv_length=5,
        mask_function=transformers.masking_utils.bidirectional_mask_function,
        dtype=torch.float64,
    )
    found = attention_interface.attention(module, q, k, v, mask)[0]
    assert_near(found, sdpa_attention_forward(module, q, k, v, None, is_causal=False)[0])
    assert paths == {"packed": 1, "rest": 1}


def test_other_lengths(paths: Counter[str]) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module, q, k, v = call_arguments()
    found = attention_interface.attention(module, q[:, :, :3], k, v, None)[0]
    assert_near(found, sdpa_attention_forward(module, q[:, :, :3], k, v, None, is_causal=False)[0])
    assert paths == {"rest": 1}


# ---- texts in one row ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_texts_in_one_row(dtype: torch.dtype, paths: Counter[str]) -> None:
    """What transformers' DataCollatorWithFlattening makes for kernels without padding."""
    model, twin = (each.to(dtype) for each in pair(ENCODERS[0]))
    lengths = [5, 1, 13, 7]
    texts = [batch_for(torch.ones(1, length, dtype=torch.bool), seed=length)["input_ids"] for length in lengths]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": text[0].tolist()} for text in texts])
    batch.pop("labels")
    found = states(twin(**batch))[0]
    assert_near(found, torch.cat([states(model(text))[0] for text in texts]))
    assert paths["served"] == (2 if dtype == torch.float32 else 0)


def test_texts_in_one_row_that_do_not_fill_it() -> None:
    _, twin = pair(ENCODERS[0])
    with pytest.raises(ValueError, match="cu_seq_lens_q ends with 7; the queries are 2 rows of 13"):
        twin(batch_for(mask_of(RIGHT))["input_ids"][:2], cu_seq_lens_q=torch.tensor([0, 3, 7], dtype=torch.int32))


# ---- training --------------------------------------------------------------------------------------------------------


def test_dropout() -> None:
    """Uniform probabilities, and values that show each one: the rate, the factor and the mean."""
    module, *_ = call_arguments()
    lengths = torch.tensor([11, 17, 5] * 20)
    mask = torch.arange(17) < lengths[:, None]
    batch = bert_fast.masking.unpad(mask)
    values = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None, None].expand(-1, 1, 17, 17)
    q = torch.zeros(60, 3, 17, 17)
    out, _ = attention_interface.attention(
        module, q, q, torch.eye(17).expand(60, 3, 17, 17), PaddingMask.make(values, batch), dropout=0.3
    )
    assert out.shape == (60, 17, 3, 17)
    probabilities = out.transpose(1, 2) * lengths[:, None, None, None]
    visible = mask[:, None, None, :] & mask[:, None, :, None]
    assert not probabilities.masked_select(~visible).any()
    drawn = probabilities.masked_select(visible)
    kept = drawn[drawn != 0]
    assert_near(kept, torch.full_like(kept, 1 / 0.7))
    assert abs(kept.numel() / drawn.numel() - 0.7) < 0.01
    again, _ = attention_interface.attention(
        module, q, q, torch.eye(17).expand(60, 3, 17, 17), PaddingMask.make(values, batch), dropout=0.3
    )
    is_same = ((again == 0) == (out == 0)).transpose(1, 2).masked_select(visible)
    assert abs(float(is_same.float().mean()) - (0.7**2 + 0.3**2)) < 0.01


def test_training() -> None:
    """The mean over many draws is the original's; a second draw is another."""
    config = {**BERT, "num_hidden_layers": 1, "attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0}
    model, twin = (each.train() for each in pair(Kind("BertModel", config)))
    mask = mask_of(HOLES)
    batch = batch_for(mask)
    first, second = states(twin(**batch))[mask], states(twin(**batch))[mask]
    assert magnitude(first - second) > 0.1
    first.sum().backward()
    many = {name: x.repeat(100, 1) for name, x in batch.items()}
    with torch.no_grad():
        found, expected = (states(each(**many)).view(100, 4, 13, 51).mean(0)[mask] for each in (twin, model))
    assert (found - expected).abs().mean() < 0.2 * (first - expected).abs().mean()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool, paths: Counter[str]) -> None:
    """The second forward draws the same dropout, on the same path; reentrant checkpoints detach the mask before."""
    model = Kind("BertModel", {**BERT, "attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.2}).build().train()
    model.set_attn_implementation(NAME)
    mask = mask_of(HOLES)
    batch = batch_for(mask)

    def run() -> dict[str, Tensor]:
        torch.manual_seed(3)
        return gradients(model, states(model(**batch))[mask].square().mean() * 7)

    expected = run()
    model.config.use_cache = False
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    paths.clear()
    found = run()
    assert paths == {"served": 4, "packed": 1}
    assert_same_gradients(found, expected)


def test_training_after_inference_mode() -> None:
    model, twin = pair(ENCODERS[0])
    mask = mask_of(HOLES)
    batch = batch_for(mask)
    with torch.inference_mode():
        assert_near(states(twin(**batch))[mask], states(model(**batch))[mask])
    states(twin(**batch))[mask].sum().backward()


# ---- the mask --------------------------------------------------------------------------------------------------------


def test_the_masks_packing() -> None:
    mask = mask_of(HOLES)
    found = attention_interface.attention_mask(
        batch_size=4,
        q_length=13,
        kv_length=13,
        mask_function=transformers.masking_utils.bidirectional_mask_function,
        attention_mask=mask,
    )
    assert isinstance(found, PaddingMask)
    assert found.shape == (4, 1, 13, 13)
    assert torch.equal(found == 0, mask[:, None, None, :].expand(4, 1, 13, 13))
    assert found.untyped_storage().nbytes() == 4 * 13 * 4
    for same in (found.detach(), found.to("meta"), found.to("cpu"), found.to(torch.float64)):
        assert isinstance(same, PaddingMask)
        assert same.bert_fast_batch.total_tokens == int(mask.sum())
        assert same.bert_fast_batch.tiles.device == same.device
    for other in (found[:, :, :3], found + 1, torch.cat([found, found]), found.clone()):
        assert type(other) is Tensor


@pytest.mark.parametrize(
    "change",
    [
        {"mask_function": "causal_mask_function"},
        {"q_length": 7},
        {"q_offset": 1},
        {"kv_offset": 1},
        {"q_offset": torch.tensor(0)},
        {"use_vmap": True},
        {"local_size": 3},
    ],
    ids=str,
)
def test_masks_of_another_kind(change: dict[str, Any]) -> None:
    from transformers import masking_utils

    arguments: dict[str, Any] = {
        "batch_size": 4,
        "q_length": 13,
        "kv_length": 13,
        "q_offset": 0,
        "kv_offset": 0,
        "attention_mask": mask_of(HOLES),
        "use_vmap": False,
        **change,
    }
    name = arguments.pop("mask_function", "bidirectional_mask_function")
    arguments["mask_function"] = getattr(masking_utils, name)
    found, expected = attention_interface.attention_mask(**arguments), masking_utils.eager_mask(**arguments)
    assert type(found) is Tensor
    assert torch.equal(found, expected)


# ---- programs that look at programs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_regional", [False, True])
def test_compile(is_regional: bool, paths: Counter[str]) -> None:
    """One graph for all batches; also of a layer alone, which is handed the mask."""
    model, twin = pair(Kind("BertModel", {**BERT, "num_hidden_layers": 1}))
    torch._dynamo.reset()
    (twin.encoder.layer[0] if is_regional else twin).compile(fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (HOLES, "11111\n11000\n"):
            mask = mask_of(rows)
            batch = batch_for(mask)
            assert_near(states(twin(**batch))[mask], states(model(**batch))[mask])
    assert paths["served"] > 0
    assert paths["rest"] == 0
    torch._dynamo.reset()


def test_compile_without_mask() -> None:
    model, twin = pair(ENCODERS[0])
    torch._dynamo.reset()
    twin.compile(fullgraph=True, backend="eager")
    ids = batch_for(mask_of(WHOLE))["input_ids"]
    with torch.no_grad():
        assert_near(states(twin(ids)), states(model(ids)))
    torch._dynamo.reset()


def test_meta_device() -> None:
    _, twin = pair(ENCODERS[0])
    assert states(twin.to("meta")(batch_for(mask_of(HOLES))["input_ids"].to("meta"))).shape == (4, 13, 51)


def test_function_transform(paths: Counter[str]) -> None:
    model, twin = pair(ENCODERS[0], "sdpa")
    mask = mask_of(HOLES)
    embeds = torch.randn(4, 13, 51, generator=torch.Generator().manual_seed(1))

    def loss(each: Any, x: Tensor) -> Tensor:
        return states(each(inputs_embeds=x, attention_mask=mask.long()))[mask].square().mean()

    found, expected = (torch.func.grad(lambda x, each=each: loss(each, x))(embeds) for each in (twin, model))
    assert_near(found, expected)
    assert paths == {"rest": 2}


# ---- the name --------------------------------------------------------------------------------------------------------


def test_name_in_constructors(tmp_path: Path, paths: Counter[str]) -> None:
    model = ENCODERS[1].build()
    mask = mask_of(HOLES)
    batch = batch_for(mask)
    expected = states(model(**batch))[mask]
    model.save_pretrained(tmp_path / "plain")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "plain", attn_implementation=NAME)
    assert_near(states(loaded(**batch))[mask], expected)
    assert paths["served"] == 2
    loaded.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert transformers.AutoModel.from_pretrained(tmp_path / "again").config._attn_implementation == "sdpa"
    fresh = transformers.AutoModel.from_config(model.config, attn_implementation=NAME)
    fresh.load_state_dict(model.state_dict())
    assert_near(states(fresh.eval()(**batch))[mask], expected)
    assert paths["served"] == 4
    loaded.set_attn_implementation("sdpa")
    assert_near(states(loaded(**batch))[mask], expected)
    assert paths["served"] == 4


def test_swap() -> None:
    model = theirs("BertModel")
    batch = inputs(mask_of(MIXED))
    expected = states(model(**batch))[mask_of(MIXED)]
    model.set_attn_implementation(NAME)
    bert_fast.swap(model)
    assert_near(states(model(**batch))[mask_of(MIXED)], expected)
    (encoder,) = bert_fast.report(model).encoders
    assert dict(encoder.calls) == {"fast": 1}


def test_registered_twice() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def entries() -> tuple[Any, Any]:
        return ALL_ATTENTION_FUNCTIONS[NAME], ALL_MASK_ATTENTION_FUNCTIONS[NAME]

    before = entries()
    bert_fast.register_attention()
    assert entries() == before
    assert "flash" not in NAME


@pytest.mark.parametrize("missing", ["AttentionMaskInterface", "bidirectional_mask_function", "eager_mask"])
def test_old_transformers(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    monkeypatch.delattr(masking_utils, missing)
    monkeypatch.setattr("transformers.__version__", "4.48.3")
    with pytest.raises(ImportError, match=r"transformers 4\.48\.3 is installed"):
        bert_fast.register_attention()


def test_transformers_with_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    def eager_mask(batch_size: int, cache_position: Tensor, kv_length: int) -> None:
        del batch_size, cache_position, kv_length

    monkeypatch.setattr(masking_utils, "eager_mask", eager_mask)
    assert "q_length" not in inspect.signature(masking_utils.eager_mask).parameters
    with pytest.raises(ImportError, match=transformers.__version__):
        bert_fast.register_attention()


def test_off(monkeypatch: pytest.MonkeyPatch, paths: Counter[str]) -> None:
    model, twin = pair(ENCODERS[0], "sdpa")
    batch = batch_for(mask_of(HOLES))
    monkeypatch.setenv("BERT_FAST", "off")
    with pytest.warns(UserWarning, match="BERT_FAST=off"):
        bert_fast.register_attention()
    assert_near(states(twin(**batch)), states(model(**batch)))
    assert paths == {}

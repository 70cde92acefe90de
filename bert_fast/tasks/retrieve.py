"""Queries and the passages that answer them, by vectors: training with in-batch and hard negatives, exact search."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from . import sentence_trainer
from .columns import in_one_forward
from .data.beir import is_beir, read_beir
from .data.problems import DataError
from .data.queries import Corpus, Query, read_queries
from .embeddings import embed_texts, is_cosine, load_sentence_transformer, nearest
from .ranking import ranking_measures
from .settings import Training, at_least
from .task import Model, Prediction, Task

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Retrieve"]

PASSAGE_PROMPTS = ("document", "passage", "corpus")  # as SentenceTransformer.encode_document looks for them


@dataclass(frozen=True, kw_only=True)
class Retrieve(Task[Query]):
    """
    Attributes:
        columns: of tables, see data.queries.read_queries.
        split: of folders in the layout of BEIR, see data.beir.read_beir.
        query_prompt: what is put before each query; None: what the model says.
        passage_prompt: what is put before each passage; None: likewise.
        max_length: tokens of the longest text; None: what the model takes.
        mini_batch: texts that are computed at once, so that a batch, whose passages are each other's negatives, may be
            larger than memory allows (Gao et al. 2021); None: the whole batch.
        negatives: hard negatives beside each relevant passage, at most. Where a query has more they are drawn, where it
            has fewer passages of the corpus are added at random.
        mine_negatives: negatives that are found for each query before training: the start model's best results that are
            not known to be relevant, by exact search; 0: none.
        top: results of a query.
    """

    name: ClassVar[str] = "retrieve"
    pipeline: ClassVar[str] = "sentence-similarity"
    library: ClassVar[str] = "sentence-transformers"
    parts: ClassVar[tuple[str, ...]] = ("query", "positive")
    training: ClassVar[dict[str, Any]] = {"epochs": 3, "batch_size": 64, "learning_rate": 2e-5}

    columns: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    query_prompt: str | None = None
    passage_prompt: str | None = None
    max_length: int | None = None
    mini_batch: int | None = None
    negatives: int = 5
    mine_negatives: int = 0
    top: int = 100

    def __post_init__(self) -> None:
        for name, least in (("max_length", 3), ("mini_batch", 1), ("negatives", 0), ("mine_negatives", 0), ("top", 10)):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), least)
        if self.mine_negatives > self.negatives:
            raise ValueError(
                f"mine_negatives is {self.mine_negatives}; it must be at most negatives, which is {self.negatives}"
            )

    @property
    def best(self) -> str:
        return "ndcg@10"

    # ---- data ----

    def read(self, file: Path, *, is_labelled: bool = True) -> list[Query]:
        if is_beir(file):
            return read_beir(file, self.split, is_labelled=is_labelled)
        if self.split is not None:
            raise ValueError(f"split is {self.split!r}; {file} is a table, which has none")
        return read_queries(file, self.columns, is_labelled=is_labelled)

    def fitted(self, examples: Sequence[Query]) -> Self:  # noqa: ARG002
        """Without the split, which was that of the training queries: another folder's, or another use, has its own."""
        return replace(self, split=None)

    # ---- model ----

    def build(self, source: str) -> Model:
        model = load_sentence_transformer(source, self.max_length)
        is_cosine(model)
        prompts: dict[str, str] = model.module.prompts  # type: ignore[assignment]
        if self.query_prompt is not None:
            prompts["query"] = self.query_prompt
        if self.passage_prompt is not None:
            prompts[PASSAGE_PROMPTS[0]] = self.passage_prompt
        return model

    def load(self, folder: str) -> Model:
        return self.build(folder)

    def trainer(self, model: Model, examples: Sequence[Query], arguments: dict[str, Any]) -> Any:
        from sentence_transformers.base.sampler import BatchSamplers

        mined = self._mined(model, examples) if self.mine_negatives else [()] * len(examples)
        rows = self._rows(examples, mined, arguments["seed"])
        share = len(rows["query"]) / len(examples)  # arguments are for as many rows as there are examples
        steps = {
            name: max(1, round(arguments[name] * share))
            for name in ("warmup_steps", "logging_steps")
            if arguments[name]
        }
        query, passage = _prompts(model)
        return sentence_trainer.trainer(
            model,
            rows,
            arguments | steps,
            self._loss(model),
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            prompts={name: query if name == "query" else passage for name in rows},
        )

    def _loss(self, model: Model) -> nn.Module:
        from sentence_transformers import util
        from sentence_transformers.sentence_transformer import losses

        options: dict[str, Any] = {} if is_cosine(model) else {"scale": 1.0, "similarity_fct": util.dot_score}
        module: Any = model.module
        if self.mini_batch is None:
            return in_one_forward(losses.MultipleNegativesRankingLoss(module, **options))
        return losses.CachedMultipleNegativesRankingLoss(  # type: ignore[no-any-return, unused-ignore]
            module, mini_batch_size=self.mini_batch, **options
        )

    def _rows(self, examples: Sequence[Query], mined: Sequence[Sequence[str]], seed: int) -> dict[str, list[str]]:
        """A training row for each query and relevant passage, all with the same number of hard negatives."""
        negatives = [
            list(dict.fromkeys((*query.negatives, *found))) for query, found in zip(examples, mined, strict=True)
        ]
        count = min(self.negatives, max(map(len, negatives)))
        names = [f"negative_{number}" for number in range(1, count + 1)]
        rows: dict[str, list[str]] = {name: [] for name in ("query", "positive", *names)}
        draw = random.Random(seed)
        for query, hard in zip(examples, negatives, strict=True):
            for positive in query.positives:
                chosen = draw.sample(hard, min(count, len(hard)))
                chosen += [_other(query, draw) for _ in range(count - len(chosen))]
                rows["query"].append(query.text)
                for name, document in zip(("positive", *names), (positive, *chosen), strict=True):
                    rows[name].append(query.corpus.texts[query.corpus.rows[document]])
        if not rows["query"]:
            raise DataError("the training queries have no relevant passages")
        return rows

    def _mined(self, model: Model, examples: Sequence[Query]) -> list[list[str]]:
        most = max(len(query.positives) for query in examples)
        found = self._search(model, examples, Training().tokens_per_batch, self.mine_negatives + most)
        result = []
        for query, ranked in zip(examples, found, strict=True):
            others = [name for name, _ in ranked if name not in query.positives]
            result.append(others[: self.mine_negatives])
        return result

    def save(self, trainer: Any, folder: Path) -> None:
        sentence_trainer.save(trainer, folder)

    # ---- use ----

    def predict(self, model: Model, examples: Sequence[Query], tokens_per_batch: int) -> list[Prediction]:
        """The best documents of the whole corpus for each query: {"id", "results": [{"id", "score"}, ...]}.

        A document that has the query's id and contains its text is the query itself, as in some of BEIR's data, and is
        left out.
        """
        found = self._search(model, examples, tokens_per_batch, self.top)
        return [
            {"id": query.id, "results": [{"id": name, "score": score} for name, score in ranked]}
            for query, ranked in zip(examples, found, strict=True)
        ]

    def _search(
        self, model: Model, examples: Sequence[Query], tokens_per_batch: int, top: int
    ) -> list[list[tuple[str, float]]]:
        if not examples:
            return []
        corpus = examples[0].corpus
        if any(query.corpus is not corpus for query in examples):
            raise ValueError("the queries are of different corpora; one call searches one corpus")
        query_prompt, passage_prompt = _prompts(model)
        queries = embed_texts(model, [query.text for query in examples], tokens_per_batch, prompt=query_prompt)
        documents = embed_texts(model, corpus.texts, tokens_per_batch, prompt=passage_prompt)
        found = nearest(model, queries, documents, top + 1)  # one may be the query itself
        return [_without_itself(query, ranked)[:top] for query, ranked in zip(examples, found, strict=True)]

    def measure(self, examples: Sequence[Query], predictions: Sequence[Prediction]) -> dict[str, float]:
        """See ranking_measures; recall@100 where there are as many results."""
        rankings = [[hit["id"] for hit in row["results"]] for row in predictions]
        measures = ranking_measures([query.positives for query in examples], rankings)
        return {name: value for name, value in measures.items() if name != "recall@100" or self.top >= 100}


def _prompts(model: Model) -> tuple[str, str]:
    """What SentenceTransformer.encode_query and encode_document put before texts."""
    prompts: Any = model.module.prompts
    passage = next((prompts[name] for name in PASSAGE_PROMPTS if name in prompts), "")
    return prompts.get("query", ""), passage


def _other(query: Query, draw: random.Random) -> str:
    """A document that is not known to be relevant."""
    corpus: Corpus = query.corpus
    if len(query.positives) == len(corpus):
        raise DataError(f"{query.place}: every document is relevant, so there is no negative")
    while (name := draw.choice(corpus.ids)) in query.positives:
        pass
    return name


def _without_itself(query: Query, ranked: Sequence[tuple[int, float]]) -> list[tuple[str, float]]:
    corpus = query.corpus
    named = [(corpus.ids[row], score) for row, score in ranked]
    return [
        (name, score) for name, score in named if name != query.id or query.text not in corpus.texts[corpus.rows[name]]
    ]

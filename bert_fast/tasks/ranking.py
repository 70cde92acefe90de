"""The measures of ranked lists, by trec_eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["ranking_measures"]

MEASURES = {"ndcg@10": "ndcg_cut_10", "recall@10": "recall_10", "recall@100": "recall_100", "map": "map"}


def ranking_measures(relevant: Sequence[Mapping[str, int]], rankings: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means over queries of nDCG@10, recall@10 and @100, MRR@10, and MAP over the lists' whole length.

    A query without relevant documents counts 0 in each, as in trec_eval.

    Args:
        relevant: of each query the grades of documents by id; from 1 on they are relevant.
        rankings: of each query the ids that were found, the best first, none of them twice.

    Returns:
        ndcg@10, recall@10, recall@100, mrr@10 and map.
    """
    from pytrec_eval import RelevanceEvaluator

    qrels = {str(row): dict(grades) for row, grades in enumerate(relevant)}
    # trec_eval orders equal scores by id; the list's own order is what counts here.
    runs = {str(row): {name: -float(rank) for rank, name in enumerate(names)} for row, names in enumerate(rankings)}
    if len(qrels) != len(runs):
        raise ValueError(f"there are {len(qrels)} queries and {len(runs)} lists")
    found = RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.10,100", "map", "recip_rank"}).evaluate(runs).values()
    queries = max(1, len(qrels))
    result = {name: sum(values[theirs] for values in found) / queries for name, theirs in MEASURES.items()}
    result["mrr@10"] = sum(values["recip_rank"] for values in found if values["recip_rank"] >= 1 / 10) / queries
    return result

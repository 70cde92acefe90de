"""python -m benchmarks.pretrain --text FILE: pretraining, beside transformers' BertForPreTraining and Trainer.

Both begin with the same weights and read the same packs in the same order, with the same masks, optimizer and schedule;
the Trainer's are padded to their longest sequence, and its model runs SDPA. Each has a process of its own, on a GPU if
there is one. Held-out text judges both checkpoints in the same way. What is in --work already is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bert_fast.functional import IGNORED
from bert_fast.pretraining.batches import PretrainingBatch
from bert_fast.pretraining.config import RunConfig, from_dict
from bert_fast.pretraining.log import read_log
from bert_fast.pretraining.loop import Progress, Run

from .facts import heading, write_json

OUT = Path("benchmarks/results/cpu-pretrain.json")
PACKAGES = ("bert-fast", "torch", "transformers", "accelerate", "numpy")
OURS, THEIRS = "bert_fast", "transformers Trainer"

START = Progress(step=0, phase=0, phase_steps=(0,), elapsed=0.0)

# Steps that are timed together.
STRETCH = 25


def configuration(options: argparse.Namespace, out: Path) -> RunConfig:
    """The run that both sides make."""
    return from_dict(
        {
            "out": str(out),
            "data": {"corpus": str(options.work / "corpus"), "instances": options.instances},
            "model": {"preset": options.preset, "max_position_embeddings": options.length},
            "optimizer": {"learning_rate": options.learning_rate},
            "schedule": {"steps": options.steps},
            "batch": {"tokens_per_step": options.tokens, "tokens_per_pack": options.tokens},
            "train": {"seed": 1, "precision": options.precision},
            "log": {"every": STRETCH, "tensorboard": False},
            "eval": {"every": 0, "packs": 40},
            "checkpoint": {"every": 0},
        }
    )


def prepare(options: argparse.Namespace) -> None:
    from bert_fast.pretraining import corpus, prepare, vocabulary

    folder = options.work / "vocabulary"
    if not folder.exists():
        files = corpus.find_files(options.text)
        documents = (one for file in files for one in corpus.read_documents(file, on_problem=corpus.refuse))
        vocabulary.train(documents, size=options.vocabulary).save(folder)
    prepare.prepare(
        options.work / "corpus",
        sources=options.text,
        vocabulary=vocabulary.load(folder),
        held_out=0.01,
        workers=options.threads,
        on_problem=corpus.refuse,
    )


# ---- the sides -------------------------------------------------------------------------------------------------------


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    config = configuration(options, options.work / "ours")
    result = Run(config).go(resume=False)
    lines = [line for line in read_log(config.out / "log.jsonl") if line["kind"] == "step"]
    return {**times([line["seconds"] for line in lines]), "checkpoint": str(result.folder)}


def times(stretches: Sequence[float]) -> dict[str, Any]:
    """Of seconds for each STRETCH steps; the first ones warm up."""
    return {
        "seconds_per_step": statistics.median(stretches[1:] or stretches) / STRETCH,
        "seconds": sum(stretches),
        "stretches": list(stretches),
    }


def padded(batch: PretrainingBatch) -> dict[str, Tensor]:
    """The batch as transformers takes it."""
    lengths = batch.packed.cu_seqlens.diff()
    columns = torch.arange(batch.packed.max_seqlen)
    mask = columns < lengths[:, None]
    result = {"attention_mask": mask.long()}
    for name, rows, fill in (
        ("input_ids", batch.packed.ids, 0),
        ("token_type_ids", batch.packed.token_types, 0),
        ("labels", batch.labels[0], IGNORED),
    ):
        assert rows is not None
        result[name] = torch.full(mask.shape, fill).masked_scatter(mask, rows)
    if batch.next_sentence is not None:
        result["next_sentence_label"] = batch.next_sentence
    return result


def run_theirs(options: argparse.Namespace) -> dict[str, Any]:
    import transformers
    from torch.utils.data import DataLoader, IterableDataset

    subject = Run(configuration(options, options.work / "unused"))
    first = options.work / "first"
    subject.accelerator.unwrap_model(subject.objective).model.save_pretrained(first)
    model = transformers.BertForPreTraining.from_pretrained(first, attn_implementation="sdpa")

    class Packs(IterableDataset[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for number, packs in enumerate(subject.supply.steps(0, 0)):
                yield padded(subject.supply.masked(packs[0], number / options.steps))

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
            return DataLoader(Packs(), batch_size=None)

    class Ticks(transformers.TrainerCallback):
        """Notes when each stretch ends."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            if state.global_step % STRETCH == 0:
                ends.append(time.perf_counter())

    settings = subject.config.optimizer
    arguments = transformers.TrainingArguments(
        output_dir=str(options.work / "trainer"),
        max_steps=options.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(subject.config.schedule.warmup * options.steps),
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_epsilon=settings.eps,
        max_grad_norm=settings.clip_norm,
        optim="adamw_torch_fused",
        logging_steps=STRETCH,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=options.precision == "bf16",
        seed=1,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Packs(), callbacks=[Ticks()])
    ends = [time.perf_counter()]
    trainer.train()
    folder = options.work / "theirs"
    model.save_pretrained(folder)
    stretches = [stop - start for start, stop in pairwise(ends)]
    return {**times(stretches), "checkpoint": str(folder)}


def judge(options: argparse.Namespace, checkpoint: str) -> dict[str, Any]:
    """Loss and accuracy on held-out text."""
    from bert_fast import checkpoint as files

    subject = Run(configuration(options, options.work / "unused"))
    files.apply(subject.accelerator.unwrap_model(subject.objective).model, files.load(checkpoint))
    found = subject._evaluate(None, START._replace(step=options.steps))
    assert found is not None
    return {"mlm_loss": found.mlm_loss, "mlm_accuracy": found.mlm_accuracy, "nsp_accuracy": found.nsp_accuracy}


SIDES = {OURS: run_ours, THEIRS: run_theirs}


# ---- the whole -------------------------------------------------------------------------------------------------------


def in_a_process(options: argparse.Namespace, side: str) -> dict[str, Any]:
    """What a side says, in a process of its own."""
    file = options.work / f"{side.split()[0]}.json"
    if not file.exists():
        command = [sys.executable, "-m", "benchmarks.pretrain", *sys.argv[1:], "--side", side]
        subprocess.run(command, check=True)
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files or folders of text")
    parser.add_argument("--work", type=Path, default=Path("build/pretrain"), help="where corpus and models go")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--instances", choices=("nsp", "sop", "full"), default="nsp")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.side:
        result = SIDES[options.side](options)
        result["evaluation"] = judge(options, result.pop("checkpoint"))
        (options.work / f"{options.side.split()[0]}.json").write_text(json.dumps(result))
        return
    console = Console()
    prepare(options)
    results = {side: in_a_process(options, side) for side in SIDES}
    show(console, options, results)
    hidden = ("side", "out", "work", "text")
    settings = {name: value for name, value in vars(options).items() if name not in hidden}
    record = heading(PACKAGES, is_dry=False)
    record["runs"] = [{"settings": settings, "sides": results}]
    write_json(options.out, record)


def show(console: Console, options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    table = Table("", "steps", "median step", "all of it", "held-out loss", "accuracy", "next sentence", box=box.SIMPLE)
    for side, result in results.items():
        judged = result["evaluation"]
        nsp = judged["nsp_accuracy"]
        table.add_row(
            side,
            str(options.steps),
            f"{1000 * result['seconds_per_step']:.0f} ms",
            f"{result['seconds'] / 60:.1f} min",
            f"{judged['mlm_loss']:.4f}",
            f"{judged['mlm_accuracy']:.1%}",
            "" if nsp is None else f"{nsp:.1%}",
        )
    console.print(table)
    ours, theirs = results[OURS], results[THEIRS]
    difference = ours["evaluation"]["mlm_loss"] / theirs["evaluation"]["mlm_loss"] - 1
    console.print(
        f"time {ours['seconds_per_step'] / theirs['seconds_per_step']:.2f} of the Trainer's, held-out loss "
        f"{difference:+.2%} beside it"
    )


if __name__ == "__main__":
    main()

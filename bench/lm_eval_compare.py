"""Score a model with lm-evaluation-harness twice, through a server of ours and in Transformers, and compare.

    pip install 'lm_eval[api]' accelerate
    python bench/lm_eval_compare.py --model FOLDER --text wiki.valid.txt

Both read the same folder of safetensors with weights of 16 bits; Transformers multiplies them in float32,
because its logits of bfloat16 alone shift a score by tenths. The tasks are made from the text, so that
nothing is downloaded: which of four continuations belongs to the first half of a sentence, the last word of a
sentence, and the perplexity of whole paragraphs. Ends in one line of JSON; exit code 1 when a score differs
by more than --tolerance: points of an accuracy, percent of a perplexity.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHOICES = 4
SEED = 7
COMMON = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
metadata: {{version: 1}}
"""
TASKS = {
    "continuations": """
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{label}}"
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "last_words": """
output_type: loglikelihood
doc_to_text: "{{start}}"
doc_to_target: "{{' ' + last}}"
metric_list: [{metric: acc}, {metric: perplexity}]
""",
    "paragraphs": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
}

# ----------------------------------------------------------------------------------------------- tasks


def sentences(text: str) -> list[str]:
    """Short sentences, without what the corpus did to their punctuation."""
    found = []
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("="):
            plain = re.sub(r" @(\W)@ ", r"\1", line.strip())
            plain = re.sub(r" ([.,;:)'])", r"\1", plain).replace("( ", "(")
            found += re.split(r"(?<=[.!?]) (?=[A-Z])", plain)
    return [each for each in found if 12 <= len(each.split()) <= 24 and "<unk>" not in each]


def documents(text: str, count: int) -> dict[str, list[dict[str, Any]]]:
    """The documents of each task. Wrong endings are those of other sentences."""
    draw = random.Random(SEED)
    chosen = draw.sample(sentences(text), count)
    halves = [(words[: len(words) // 2], words[len(words) // 2 :]) for words in map(str.split, chosen)]
    endings = [" ".join(end) for _, end in halves]
    continuations = []
    for number, (start, _) in enumerate(halves):
        wrong = draw.sample(endings[:number] + endings[number + 1 :], CHOICES - 1)
        label = draw.randrange(CHOICES)
        choices = [*wrong[:label], endings[number], *wrong[label:]]
        continuations.append({"start": " ".join(start), "endings": choices, "label": label})
    split = [sentence.rstrip(".!?").rsplit(" ", 1) for sentence in chosen]
    last = [{"start": start, "last": word} for start, word in split]
    lines = (line.strip() for line in text.splitlines())
    long = [line for line in lines if len(line.split()) >= 100]
    paragraphs = [{"text": line} for line in draw.sample(long, max(count // 8, 1))]
    return {"continuations": continuations, "last_words": last, "paragraphs": paragraphs}


def write_tasks(folder: Path, text: str, count: int) -> None:
    for task, documents_of in documents(text, count).items():
        file = folder / f"{task}.jsonl"
        file.write_text("".join(json.dumps(each) + "\n" for each in documents_of), encoding="utf-8")
        description = COMMON.format(task=task, file=file) + TASKS[task]
        (folder / f"{task}.yaml").write_text(description, encoding="utf-8")


# --------------------------------------------------------------------------------------------- backends


@contextmanager
def server(python: str, model: Path, weights: str) -> Iterator[str]:
    """`ridgeline serve` on a free port; its URL."""
    command = [python, "-m", "ridgeline.cli.main", "serve", str(model), "--port", "0", "--weights", weights]
    process = subprocess.Popen(
        [*command, "--served-model-name", "ours"], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stderr is not None
    try:
        url = ""
        for line in process.stderr:
            if " listening " in line:
                url = "http://127.0.0.1:" + line.split("port=")[1].split()[0]
            if " ready " in line:
                break
        else:
            raise SystemExit(f"the server ended with exit code {process.wait()}")
        yield url
    finally:
        process.terminate()
        process.communicate()


def scores(model: str, arguments: dict[str, Any], folder: Path, batch_size: int) -> dict[str, float]:
    """Each task's metrics, as the harness finds them."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = {}
    for task in TASKS:  # one by one: together, Transformers' scores of last words were seen to shift
        result = simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=[task],
            task_manager=TaskManager(include_path=str(folder)),
            batch_size=batch_size,
            bootstrap_iters=0,
            log_samples=False,
        )
        found[task] = result["results"][task]
    return {
        f"{task} {name.partition(',')[0]}": value
        for task, metrics in found.items()
        for name, value in metrics.items()
        if isinstance(value, float) and "stderr" not in name
    }


def difference(ours: float, theirs: float, metric: str) -> float:
    """In points for an accuracy, in percent for a perplexity."""
    return 100 * abs(ours - theirs) / (theirs if metric.endswith("perplexity") else 1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model in safetensors")
    parser.add_argument("--text", type=Path, required=True, help="text of which the tasks are made")
    parser.add_argument("--count", type=int, default=200, help="sentences")
    parser.add_argument("--weights", default="W16A16", help="format that the server runs")
    parser.add_argument("--dtype", default="float32", help="format that Transformers runs")
    parser.add_argument("--tolerance", type=float, default=0.5)
    parser.add_argument("--ridgeline-python", default=sys.executable, help="the Python that has ridgeline")
    given = parser.parse_args(arguments)
    model = given.model.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder, given.text.read_text(encoding="utf-8"), given.count)
        with server(given.ridgeline_python, model, given.weights) as url:
            client = {
                "model": "ours", "base_url": f"{url}/v1/completions", "tokenizer": str(model),
                "tokenizer_backend": "huggingface", "num_concurrent": 4, "max_retries": 1,
            }  # fmt: skip
            ours = scores("local-completions", client, folder, 8)
        theirs = scores("hf", {"pretrained": str(model), "dtype": given.dtype, "device": "cpu"}, folder, 8)
    differences = {metric: difference(ours[metric], theirs[metric], metric) for metric in theirs}
    for metric in theirs:
        line = f"{metric:<28} {ours[metric]:>10.4f} {theirs[metric]:>10.4f} {differences[metric]:>7.3f}"
        print(line)
    same = max(differences.values()) <= given.tolerance
    print(json.dumps({"ours": ours, "transformers": theirs, "differences": differences, "same": same}))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

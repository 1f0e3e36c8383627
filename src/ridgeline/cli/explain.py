"""`ridgeline explain`: where the time goes, how far from the limits that is, and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ridgeline.cli import options
from ridgeline.cli.bench import Batch, OutputTokens, PromptTokens
from ridgeline.cli.options import flag, given
from ridgeline.cli.output import print_json
from ridgeline.cli.progress import fetch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ridgeline.apps.explain.answer import Explanation
    from ridgeline.apps.explain.attach import Served
    from ridgeline.apps.explain.suggest import Suggestion

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Catalog name, path, or hf.co/<org>/<repo>[:<file or quant>] (default: smollm2).",
    ),
]
Dataset = Annotated[
    Path | None,
    flag(
        "dataset",
        "Prompts of yours, JSON lines or ShareGPT's JSON: answer some too, and say what guesses bring them.",
    ),
]
Speculation = Annotated[
    str | None,
    flag("speculation", "With --dataset, how tokens are guessed ahead: auto, grammar, ngram, suffix or off."),
]
Repeats = Annotated[int, flag("repeats", "Rounds; the median counts.", "-r")]
Ttft = Annotated[float | None, flag("ttft", "Target: at most so many ms to the first token.")]
Itl = Annotated[float | None, flag("itl", "Target: at most so many ms from a token to the next.")]
Url = Annotated[
    str | None, flag("url", "Explain the recent steps of this server, as http://127.0.0.1:8000, instead.")
]
Recent = Annotated[int, flag("recent", "Of a server: how many steps.")]
Try = Annotated[
    bool,
    flag("try", "Try the first suggestion right away, in turns with the settings as they are."),
]
ApiKey = Annotated[str | None, flag("api-key", "Key of the server.")]


def explain(
    model: Model = None,
    prompt_tokens: PromptTokens = 512,
    output_tokens: OutputTokens = 128,
    batch: Batch = 1,
    dataset: Dataset = None,
    repeats: Repeats = 3,
    ttft: Ttft = None,
    itl: Itl = None,
    weights: options.WeightFormat = None,
    kv_format: options.KVFormat = None,
    threads: options.Threads = None,
    device: options.Device = None,
    speculation: Speculation = None,
    no_packed_cache: options.NoPackedCache = False,
    try_: Try = False,
    url: Url = None,
    recent: Recent = 256,
    api_key: ApiKey = None,
    json: options.Json = False,
) -> None:
    """Run a workload and say where its time went, how far that is from the ceilings, and what to change."""
    if url is not None:
        _refuse_beside_url(try_, dataset)
        _explain_server(url, recent, api_key, model, kv_format, json)
        return
    from ridgeline.apps.benchmark import Workload
    from ridgeline.apps.explain.answer import Targets
    from ridgeline.apps.explain.answer import explain as answer
    from ridgeline.apps.explain.attempt import attempt, explained_by_fits
    from ridgeline.apps.explain.suggest import Command
    from ridgeline.apps.explain.texts import Texts
    from ridgeline.apps.operations import bench_config, run
    from ridgeline.apps.plan.model import open_model
    from ridgeline.cli.explain_report import RunReport
    from ridgeline.model.catalog import DEFAULT_MODEL, resolve

    targets = Targets(_seconds(ttft), _seconds(itl))
    workload = Workload(prompt_tokens, output_tokens, batch)
    chosen = given(weights=weights, kv_format=kv_format, threads=threads, device=device)
    packed = options.packed_cache(no_packed_cache)
    config = bench_config(batch, **chosen, **given(model=model, packed_cache=packed))
    texts = Texts.of_file(dataset, workload)
    config = texts.configured(config, speculation)
    shape = {"prompt-tokens": prompt_tokens, "output-tokens": output_tokens, "batch": batch}
    flags = {name.replace("_", "-"): value for name, value in chosen.items()}
    others = given(dataset=dataset, speculation=speculation, ttft=ttft, itl=itl)
    command = Command("explain", model or DEFAULT_MODEL, {**shape, **flags, **others})
    _refuse_reference(config.device)
    fetch(model)
    done = run(config, workload, repeats, "once", texts.answer)
    with open_model(resolve(config.model)) as source:

        def explained() -> Explanation:
            return answer(source, done, config, targets, command, texts.answered)

        found = explained_by_fits(done, explained) if try_ else explained()
    first = found.suggestions[0] if try_ and found.suggestions else None
    tried = None if first is None else attempt(first, config, workload, repeats, texts.samples)
    report = RunReport(found, targets, tried)
    if json:
        print_json(report.to_json())
    else:
        report.show()


def _refuse_beside_url(try_: bool, dataset: Path | None) -> None:
    from ridgeline.types import ConfigError

    for name, asked in (("try", try_), ("dataset", dataset is not None)):
        if asked:
            raise ConfigError(f"--{name} is given beside --url; accepted: one of them")


def _refuse_reference(device: str) -> None:
    from ridgeline.types import ConfigError

    if device == "reference":
        raise ConfigError("device is reference, which is nowhere near any ceiling; accepted: auto, cpu, cuda")


def _explain_server(
    url: str, recent: int, api_key: str | None, model: str | None, kv_format: str | None, json: bool
) -> None:
    from ridgeline.apps.explain.attach import recent_steps
    from ridgeline.cli.explain_report import ServerReport

    served = recent_steps(url, recent, api_key)
    suggestions, why = _of_server(served, url, model, kv_format or "KV16")
    report = ServerReport(url, served, suggestions, why)
    if json:
        print_json(report.to_json())
    else:
        report.show()


def _of_server(
    served: Served, url: str, model: str | None, kv_format: str
) -> tuple[Sequence[Suggestion], str | None]:
    """Suggestions for a server on this machine, or why there are none."""
    from ridgeline.apps.explain.answer import suggestions_of_server
    from ridgeline.apps.explain.suggest import Command
    from ridgeline.apps.plan.model import open_model
    from ridgeline.model.catalog import resolve
    from ridgeline.resources.probe import quick_ceilings
    from ridgeline.types import RidgelineError

    name = model or served.model
    try:
        path = resolve(name, pull_missing=False)
        with open_model(path) as source:
            ceilings = quick_ceilings(device=served.device or "cpu")
            command = Command("serve", name)
            return suggestions_of_server(source, served, ceilings, command, url, kv_format), None
    except RidgelineError as error:
        if model is not None:
            raise
        return (), f"nothing is suggested, MODEL may say which model it is: {error}"


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3

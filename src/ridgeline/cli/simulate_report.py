"""What `ridgeline simulate` prints: times by service class, and what the machine did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ridgeline.cli.output import console, facts, figure, table
from ridgeline.cli.output import milliseconds as _ms

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ridgeline.apps.plan.host import Host

_TIMES = {"TTFT": "ttft_ms", "ITL": "itl_ms", "E2E": "e2e_ms"}
_COLUMNS = ("mean", "p50", "p95", "p99", "max")


def show(model: str, host: Host, found: Mapping[str, Any]) -> None:
    shown = table("", "ms", *_COLUMNS, "target", right=(*_COLUMNS, "target"))
    for name, each in found["classes"].items():
        for label, key in _TIMES.items():
            spread = each[key] or {}
            target = ((each["goodput"] or {}).get("targets_ms") or {}).get(key.removesuffix("_ms"))
            cells = [_number(spread.get(column)) for column in _COLUMNS]
            shown.add_row(name if label == "TTFT" else "", label, *cells, _number(target))
    console().print(shown)
    console().print()
    facts(_facts(model, host, found))


def _facts(model: str, host: Host, found: Mapping[str, Any]) -> dict[str, str]:
    usage = found["usage"]
    rows = {
        "model": model,
        "machine": f"{host.name}{f' × {host.count}' if host.count > 1 else ''} ({host.source})",
        "served": f"{found['requests']:,} requests in {_seconds(found['duration_s'])}, "
        f"{found['output_tokens']:,} tokens, {_number(found['output_tokens_per_s'])} tokens/s",
    }
    if found["refused"]:
        rows["refused"] = f"{found['refused']:,} requests, as: {found['refusal']}"
    rows["goodput"] = "; ".join(
        f"{name} {_number(each['goodput']['requests_per_s'])} requests/s, "
        f"{_share(each['goodput']['ok'] / each['requests'] if each['requests'] else None)} met both targets"
        for name, each in found["classes"].items()
        if each["goodput"] is not None
    )
    rows["cache hits"] = f"{_share(found['cache_hit_rate'])} of the tokens of prompts"
    rows["preemptions"] = f"{found['preemptions']:,}"
    rows["steps"] = (
        f"{usage['steps']:,} of {_number(usage['rows_per_step'])} rows in the mean, "
        f"{_share(usage['busy'])} of the time; meanwhile MBU {_share(usage['mbu_while_busy'])}, "
        f"MFU {_share(usage['mfu_while_busy'])}, {_number(usage['running'])} sequences running"
    )
    rows["KV cache"] = (
        f"{_share(usage['kv_cache'])} in use in the mean, {_share(usage['kv_cache_peak'])} at most"
    )
    return rows


def _number(value: float | None) -> str:
    return "–" if value is None else figure(value)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _seconds(value: float) -> str:
    return f"{value:,.1f} s" if value >= 10 else _ms(value)

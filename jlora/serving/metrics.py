"""What a server did, in numbers: throughput, quantiles of latencies, hits and evictions.

`summary` gives them as a dictionary, `prometheus` as the text that Prometheus reads. Latencies are
those of the last `WINDOW` requests.

Reference: https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4).
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jlora.serving.pages import Table, count_free
from jlora.serving.schedule import Queue

WINDOW = 1024
QUANTILES = (0.5, 0.95, 0.99)


class Measures(NamedTuple):
    """Sums since the start, and the latest latencies in seconds."""

    began: float  # when the server started, by the clock of the requests
    finished: Mapping[str, int] = {}  # requests by why they ended: stop, length, late, error, ...
    prompt_tokens: int = 0
    tokens: int = 0  # generated
    steps: int = 0  # batches of the decoder, prompts included
    first: tuple[float, ...] = ()  # from arrival to the first token
    whole: tuple[float, ...] = ()  # from arrival to the last token


def ended(measures: Measures, why: str, seconds: float | None = None) -> Measures:
    """One more request that ended.

    Args:
      measures: as they are.
      why: it ended: stop, length, late, error, cancelled.
      seconds: since its arrival, where it was answered; None: it was not.

    Returns:
      Other measures.
    """
    finished = {**measures.finished, why: measures.finished.get(why, 0) + 1}
    whole = measures.whole if seconds is None else (*measures.whole, seconds)[-WINDOW:]
    return measures._replace(finished=finished, whole=whole)


def summary(measures: Measures, queue: Queue, table: Table, now: float) -> dict[str, float]:
    """The figures.

    Args:
      measures: of the engine.
      queue: of the engine.
      table: of its pages.
      now: by the clock of the requests.

    Returns:
      Numbers by name; quantiles are absent while no request has ended.
    """
    seconds = max(now - measures.began, 1e-9)
    uses = table.hits + table.misses
    figures = {
        "uptime_seconds": seconds,
        "requests_waiting": len(queue.waiting),
        "requests_running": len(queue.running),
        "prompt_tokens_total": measures.prompt_tokens,
        "generated_tokens_total": measures.tokens,
        "steps_total": measures.steps,
        "generated_tokens_per_second": measures.tokens / seconds,
        "pages": len(table.free) - 1,
        "pages_free": count_free(table),
        "adapters_resident": len(table.held),
        "adapter_hits_total": table.hits,
        "adapter_misses_total": table.misses,
        "adapter_evictions_total": table.evictions,
        "adapter_hit_rate": table.hits / uses if uses else 0.0,
    }
    for name, values in (("first_token", measures.first), ("request", measures.whole)):
        if values:
            for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True):
                figures[f"{name}_seconds_p{100 * q:g}"] = float(value)
    return figures


def prometheus(measures: Measures, queue: Queue, table: Table, now: float) -> str:
    """The figures as Prometheus reads them.

    Args:
      measures: of the engine.
      queue: of the engine.
      table: of its pages.
      now: by the clock of the requests.

    Returns:
      Text, one line per figure after a line with its type.
    """
    lines = []
    for name, value in summary(measures, queue, table, now).items():
        if "_seconds_p" in name:
            continue
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# TYPE jlora_{name} {kind}", f"jlora_{name} {value:g}"]
    lines.append("# TYPE jlora_requests_total counter")
    for why, count in sorted(measures.finished.items()):
        lines.append(f'jlora_requests_total{{reason="{why}"}} {count}')
    for name, values in (("first_token", measures.first), ("request", measures.whole)):
        lines.append(f"# TYPE jlora_{name}_seconds summary")
        if values:
            for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True):
                lines.append(f'jlora_{name}_seconds{{quantile="{q:g}"}} {value:g}')
    return "\n".join(lines) + "\n"

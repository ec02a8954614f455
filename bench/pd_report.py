"""From samples to the table and to the last line. Pure.

Headline figures are of the first model, but for those that are not about computing. Where a figure could be taken
over either transport, or against either of two connectors, the one that is worse for ours is taken.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from pd_stats import Pair, Spread, early_share, median_of, pairs
from pd_values import Results, Ttft

from vllm_llmd.tables import aligned

ARMS = ("one", "pull", "push", "pull_quiet", "push_quiet", "chunk", "layer")
SHIPPED, QUIET = ("pull", "push"), ("pull_quiet", "push_quiet")
OURS = "chunk"
"""The arm that stands for ours in comparisons: the default."""

ENGINE_LAYOUT = "blocks"
"""What is outermost in the caches of the engines measured here: our connector asks vLLM for it."""

Figure = float | None


@dataclass(frozen=True)
class Of:
    """Selects measurements; what is None does not matter."""

    model: str | None = None
    transport: str | None = None
    load: str | None = None
    arm: str | None = None

    def among(self, samples: Iterable[Ttft]) -> list[Ttft]:
        wanted = {name: value for name, value in vars(self).items() if value is not None}
        return [each for each in samples if all(getattr(each, name) == value for name, value in wanted.items())]


def last_line(results: Results) -> dict[str, object]:
    """The figures that the goals are about; None where nothing was measured."""
    model = results.settings.models[0]
    samples = Of(model=model).among(results.ttft)
    two = ("2048", "6000")
    return {
        "ttft_ms": {arm: _ttft_ms(samples, arm) for arm in ARMS},
        "vs_one_engine": {load: _over_transports(samples, load, vs_one_engine) for load in two},
        "vs_intree_shipped": {load: _over_transports(samples, load, vs_in_tree) for load in two},
        "extra_vs_intree_quiet_tcp": {"6000": extra_vs_quiet(Of(transport="tcp", load="6000").among(samples))},
        "arrived_before_prefill_end": {"6000": _worst(_arrived(samples, "6000"), min)},
        "idle_cpu": idle_extra(results),
        "read_vs_contiguous": _worst(
            [v for (_, layout), v in read_speeds(results).items() if layout == ENGINE_LAYOUT], min
        ),
        "first_request_penalty_ms": first_request_penalty_ms(results, results.settings.models[-1]),
    }


def vs_one_engine(samples: Sequence[Ttft]) -> Figure:
    """Ours in time of one engine: the median of paired ratios."""
    return median_of(lambda pair: pair.ratio, pairs(samples, OURS))


def vs_in_tree(samples: Sequence[Ttft]) -> Figure:
    """Ours in time of the better one of vLLM's own, as shipped. They are never alive together: each is first taken
    in time of one engine within its own block."""
    theirs = [median_of(lambda pair: pair.ratio, pairs(samples, arm)) for arm in SHIPPED]
    return _divided(vs_one_engine(samples), _worst(theirs, min))


def extra_vs_quiet(samples: Sequence[Ttft]) -> Figure:
    """What ours takes beyond one engine, in what the better of vLLM's quiet ones takes beyond it."""
    theirs = [median_of(lambda pair: pair.extra, pairs(samples, arm)) for arm in QUIET]
    return _divided(median_of(lambda pair: pair.extra, pairs(samples, OURS)), _worst(theirs, min))


def idle_extra(results: Results) -> Figure:
    """Cores that an idle engine uses with our connector, less those without any: the median of paired differences."""
    differences = idle_differences(results, "ours")
    return statistics.median(differences) if differences else None


def idle_differences(results: Results, block: str) -> list[float]:
    rounds: dict[tuple[str, int, int], dict[str, float]] = {}
    for each in results.idle:
        if each.block == block:
            rounds.setdefault((each.model, each.turn, each.round), {})[each.connector] = each.cores
    return [found[block] - found["none"] for found in rounds.values() if found.keys() >= {block, "none"}]


def read_speeds(results: Results) -> dict[tuple[str, str], float]:
    """Speed of a fragmented read in that of a contiguous one, by transport and layout."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for each in results.raw_reads:
        ratios.setdefault((each.transport, each.layout), []).append(each.contiguous_ms / each.fragmented_ms)
    return {kind: statistics.median(found) for kind, found in ratios.items()}


def first_request_penalty_ms(results: Results, model: str) -> Figure:
    """How much longer the first order between two engines takes than the second.

    Told of the last model, thought to be the smallest: what a first order costs has little to do with the model, but
    hides behind the time that a large one computes.
    """
    found = [each.first_ms - each.second_ms for each in results.first_orders if each.model == model]
    return statistics.median(found) if found else None


def disagreements(results: Results) -> list[str]:
    """Arms whose answer began with another token than that of one engine alone."""
    return [f"{each.arm} ({each.model}, {each.transport})" for each in results.agreements if each.alike == 0]


def rounded(value: object) -> object:
    """Four significant digits are more than the measurements give."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _ttft_ms(samples: Sequence[Ttft], arm: str) -> dict[str, dict[str, float]]:
    """Medians by transport and load."""
    medians: dict[str, dict[str, float]] = {}
    for transport, load in _kinds(samples):
        found = [each.ttft_ms for each in Of(transport=transport, load=load, arm=arm).among(samples)]
        if found:
            medians.setdefault(transport, {})[load] = statistics.median(found)
    return medians


def _over_transports(samples: Sequence[Ttft], load: str, figure: Callable[[Sequence[Ttft]], Figure]) -> Figure:
    transports = dict.fromkeys(each.transport for each in samples)
    return _worst([figure(Of(transport=each, load=load).among(samples)) for each in transports], max)


def _arrived(samples: Sequence[Ttft], load: str) -> list[Figure]:
    """By transport."""
    transports = dict.fromkeys(each.transport for each in samples)
    shares = [early_share(Of(transport=each, load=load, arm=OURS).among(samples)) for each in transports]
    return [statistics.median(share) for share in shares if share]


def _worst(values: Sequence[Figure], choose: Callable[[list[float]], float]) -> Figure:
    known = [value for value in values if value is not None]
    return choose(known) if known else None


def _divided(ours: Figure, theirs: Figure) -> Figure:
    """None also where theirs is nothing to be divided by: they took no longer than one engine."""
    return None if ours is None or theirs is None or theirs <= 0 else ours / theirs


def _kinds(samples: Iterable[Ttft]) -> list[tuple[str, str]]:
    """Transport and load of what was measured, in the order of the first measurement."""
    return list(dict.fromkeys((each.transport, each.load) for each in samples))


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """Plain text in aligned columns: the first to the left, the others to the right."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join((self.title, *aligned([self.head, *self.rows]), ""))


def tables(results: Results) -> str:
    """Everything that was measured, with quartiles in brackets."""
    found = [_ttft_table(results, model, transport) for model, transport in _sites(results.ttft)]
    found += [_idle_table(results), _read_table(results), _first_order_table(results), _agreement_table(results)]
    return "\n".join(str(table) for table in found if table.rows)


def _sites(samples: Iterable[Ttft]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((each.model, each.transport) for each in samples))


def _ttft_table(results: Results, model: str, transport: str) -> Table:
    head = ("tokens, arm", "n", "TTFT ms", "over one engine", "beyond it, ms", "arrived early")
    table = Table(f"{model} over {transport}", head)
    here = Of(model=model, transport=transport).among(results.ttft)
    for _, load in _kinds(here):
        for arm in ARMS:
            mine = Of(load=load, arm=arm).among(here)
            if not mine:
                continue
            found: list[Pair] = [] if arm == "one" else pairs(Of(load=load).among(here), arm)
            table.rows.append(
                (
                    f"{load} {arm}",
                    str(len(mine)),
                    _shown([each.ttft_ms for each in mine], "{:.0f}"),
                    _shown([pair.ratio for pair in found], "{:.3f}"),
                    _shown([pair.extra for pair in found], "{:.0f}"),
                    _shown(early_share(mine), "{:.3f}"),
                )
            )
    return table


def _idle_table(results: Results) -> Table:
    table = Table("an idle engine, cores", ("connector", "n", "cores", "beyond none"))
    for block in dict.fromkeys(each.block for each in results.idle):
        for connector in ("none", block):
            cores = [each.cores for each in results.idle if (each.block, each.connector) == (block, connector)]
            beyond = [] if connector == "none" else idle_differences(results, block)
            table.rows.append((connector, str(len(cores)), _shown(cores, "{:.3f}"), _shown(beyond, "{:.3f}")))
    return table


def _read_table(results: Results) -> Table:
    table = Table(
        "64 MiB of scattered KV blocks against one contiguous read",
        ("transport, outermost in the cache", "n", "scattered ms", "contiguous ms", "speed"),
    )
    for transport, layout in read_speeds(results):
        mine = [each for each in results.raw_reads if (each.transport, each.layout) == (transport, layout)]
        table.rows.append(
            (
                f"{transport}, {layout}",
                str(len(mine)),
                _shown([each.fragmented_ms for each in mine], "{:.1f}"),
                _shown([each.contiguous_ms for each in mine], "{:.1f}"),
                _shown([each.contiguous_ms / each.fragmented_ms for each in mine], "{:.3f}"),
            )
        )
    return table


def _first_order_table(results: Results) -> Table:
    table = Table("the first order between two engines, ms", ("model, arm", "n", "first", "second", "penalty"))
    for model, arm in dict.fromkeys((each.model, each.arm) for each in results.first_orders):
        mine = [each for each in results.first_orders if (each.model, each.arm) == (model, arm)]
        table.rows.append(
            (
                f"{model}, {arm}",
                str(len(mine)),
                _shown([each.first_ms for each in mine], "{:.0f}"),
                _shown([each.second_ms for each in mine], "{:.0f}"),
                _shown([each.first_ms - each.second_ms for each in mine], "{:.0f}"),
            )
        )
    return table


def _agreement_table(results: Results) -> Table:
    table = Table("answers compared with those of one engine alone", ("model, arm", "n", "first token alike", "all"))
    for model, arm in dict.fromkeys((each.model, each.arm) for each in results.agreements):
        mine = [each for each in results.agreements if (each.model, each.arm) == (model, arm)]
        first, whole = sum(each.alike > 0 for each in mine), sum(each.alike == each.of for each in mine)
        table.rows.append((f"{model}, {arm}", str(len(mine)), str(first), str(whole)))
    return table


def _shown(values: Sequence[float], form: str) -> str:
    spread = Spread.of(values)
    if spread is None:
        return "-"
    median, low, high = (form.format(value) for value in (spread.median, spread.low, spread.high))
    return f"{median} [{low}, {high}]"

"""Statistics of episodes: success per setting and per group, tables, and a test whether two checkpoints differ.

results["settings"]["Carrot-v1:test"]    episodes, success_once, success_at_end, return, episode_len, wilson_95,
                                         lost, seconds, episode_ids and outcomes (one per episode)
results["means"]["vision"]               mean over the settings of a group; None if one of them was not run
results["other_temperatures"]["0.6"]     settings and means of every further temperature
"""

import math
from collections.abc import Iterator

from schemas import UserError
from vla.evaluation.episodes import is_lost
from vla.evaluation.settings import GROUP_OF, GROUPS
from vla.text import counted, markdown_code, markdown_text

BRACKETS = "Brackets are 95 % Wilson intervals. A mean gives every setting the same weight."
OUTCOMES = ("success_once", "success_at_end", "return", "episode_len")
# the title of every column of the means. The published "average of OOD" is the last one
COLUMNS = {
    "in_distribution": "in-distribution",
    "vision": "vision",
    "semantic": "semantic",
    "execution": "execution",
    "mean_of_15_out_of_distribution": "mean of the 15 out-of-distribution settings",
    "mean_of_16_published_average": "mean of all 16 settings (what is published as average of OOD)",
}


def wilson_interval(rate: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a success rate over n episodes (Wilson 1927).

    >>> low, high = wilson_interval(0.5, 100)
    >>> f"{low:.3f} {high:.3f}"
    '0.404 0.596'
    """
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def difference_interval(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """The 95 % interval of second rate minus first rate (Newcombe 1998, method 10), as if episodes were not paired.

    Args:
        first, second: success rate and number of episodes.

    >>> low, high = difference_interval((0.5, 100), (0.7, 100))
    >>> f"{low:.3f} {high:.3f}"
    '0.064 0.326'
    """
    (rate_1, low_1, high_1), (rate_2, low_2, high_2) = (
        (rate, *wilson_interval(rate, n)) for rate, n in (first, second)
    )
    change = rate_2 - rate_1
    below, above = math.hypot(rate_2 - low_2, high_1 - rate_1), math.hypot(high_2 - rate_2, rate_1 - low_1)
    return change - below, change + above


def summarize(episodes: list[dict]) -> dict:
    """The entry of results.json for one setting at one temperature."""
    count = len(episodes)
    means = {name: sum(episode[name] for episode in episodes) / count for name in OUTCOMES}
    return {
        "episodes": count,
        **means,
        "wilson_95": list(wilson_interval(means["success_once"], count)),
        "lost": sum(is_lost(episode) for episode in episodes),
        "seconds": round(sum(episode["seconds"] for episode in episodes), 2),
        "episode_ids": [episode["episode_id"] for episode in episodes],
        "outcomes": [{"episode_id": e["episode_id"]} | {name: e[name] for name in OUTCOMES} for e in episodes],
    }


def group_means(rates: dict[str, tuple[float, int]]) -> dict[str, dict | None]:
    """The columns of the table, from success rate and number of episodes by setting.

    Every setting has the same weight. A column is None if one of its settings was not run. The interval is that of
    the pooled episodes, which is a little too wide if settings differ in difficulty.
    """
    members = {**GROUPS}
    members["mean_of_15_out_of_distribution"] = tuple(name for name in GROUP_OF if GROUP_OF[name] != "in_distribution")
    members["mean_of_16_published_average"] = tuple(GROUP_OF)
    means: dict[str, dict | None] = {}
    for column in COLUMNS:
        chosen = [rates[name] for name in members[column] if name in rates]
        if len(chosen) < len(members[column]):
            means[column] = None
            continue
        rate, episodes = sum(rate for rate, _ in chosen) / len(chosen), sum(count for _, count in chosen)
        means[column] = {
            "success_once": rate,
            "settings": len(chosen),
            "episodes": episodes,
            "wilson_95": list(wilson_interval(rate, episodes)),
        }
    return means


def assemble(episodes: dict[float, dict[str, list[dict]]], about: dict) -> dict:
    """The content of results.json.

    Args:
        episodes: by temperature and setting. The first temperature is the one of `settings` and `means`.
        about: a description of what was evaluated, how and where. Its entries come first.
    """
    summaries = {}
    for temperature, by_setting in episodes.items():
        settings = {name: summarize(rows) for name, rows in by_setting.items()}
        means = group_means({name: (one["success_once"], one["episodes"]) for name, one in settings.items()})
        summaries[temperature] = {"settings": settings, "means": means}
    first, *others = summaries
    return {
        **about,
        "temperature": first,
        **summaries[first],
        "other_temperatures": {str(temperature): summaries[temperature] for temperature in others},
    }


def by_temperature(results: dict) -> Iterator[tuple[float, dict]]:
    """Yield (temperature, {"settings", "means"}) of a results.json, in the order of the temperatures."""
    yield results["temperature"], results
    for temperature, others in results["other_temperatures"].items():
        yield float(temperature), others


# ---------------------------------------------------------------------- published numbers
def published_means(row: dict) -> dict[str, dict | None]:
    """group_means() of a row of benchmarks/published.yaml, from its counts of successes.

    A row has counts per group or per setting. Each of its settings has `episodes_per_setting` episodes.
    """
    n, counts = row["episodes_per_setting"], row["successes"]
    if "settings" in row:
        return group_means({name: (count / n, n) for name, count in row["settings"].items()})
    spread = {name: (counts[group] / n / len(names), n) for group, names in GROUPS.items() for name in names}
    return group_means(spread)


# ---------------------------------------------------------------------- tables
def percent(rate: float, interval: list[float] | None = None) -> str:
    """A rate in [0, 1] in percent, with its interval if there is one.

    >>> percent(0.5, [0.4, 0.6])
    '50.0 [40.0, 60.0]'
    """
    text = f"{100 * rate:.1f}"
    return text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def temperature_name(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def means_table(results: dict, published: dict[str, dict]) -> list[list[str]]:
    """Header and rows of the table, with the published columns in their order. Published rows are below ours.

    Columns that no row has are left out. The result is [] if no row has any, because no group was run completely.
    """
    rows = {f"{results['name']}, {temperature_name(t)}": part["means"] for t, part in by_temperature(results)}
    rows |= {row["name"]: published_means(row) for row in published.values()}
    columns = [column for column in COLUMNS if any(means[column] for means in rows.values())]
    if not columns:
        return []
    table = [["success_once, percent", *(COLUMNS[column] for column in columns)]]
    for name, means in rows.items():
        found = [means[column] for column in columns]
        cells = ["not run" if mean is None else percent(mean["success_once"], mean["wilson_95"]) for mean in found]
        table.append([name, *cells])
    return table


def settings_table(results: dict) -> list[list[str]]:
    """Header and one row per setting and temperature, in the order of the published table."""
    header = ["setting", "group", "sampling", "episodes", "success_once %", "success_at_end %", "return", "length"]
    table = [[*header, "seconds"]]
    for name in sorted(results["settings"], key=lambda name: [*GROUP_OF, name].index(name)):
        for temperature, part in by_temperature(results):
            one = part["settings"][name]
            table.append(
                [
                    name,
                    GROUP_OF.get(name, "other").replace("_", "-"),
                    temperature_name(temperature),
                    str(one["episodes"]),
                    percent(one["success_once"], one["wilson_95"]),
                    percent(one["success_at_end"]),
                    f"{one['return']:.3f}",
                    f"{one['episode_len']:.1f}",
                    f"{one['seconds']:.1f}",
                ]
            )
    return table


def markdown_table(table: list[list[str]]) -> str:
    """A table of plain text as Markdown. Cells are escaped, so that none ends its cell or row, or acts as a tag."""
    if not table:
        return ""
    header, *rows = [[markdown_text(cell) for cell in row] for row in table]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def headline(results: dict) -> str:
    """One line per temperature: success over all episodes that were run."""
    lines = []
    for temperature, part in by_temperature(results):
        settings = part["settings"].values()
        count = sum(one["episodes"] for one in settings)
        rate = sum(one["success_once"] * one["episodes"] for one in settings) / count
        lines.append(
            f"success {percent(rate, list(wilson_interval(rate, count)))} % (success_once, {count} episodes of "
            f"{len(settings)} settings, {temperature_name(temperature)})"
        )
        if lost := sum(one.get("lost", 0) for one in settings):
            lines.append(f"of these, {lost} lost the simulation again and again, which counts as failed")
    return "\n".join(lines)


def markdown(results: dict, published: dict[str, dict]) -> str:
    """The content of results.md: first the means in the published column order, then every setting."""
    notes = "\n".join(
        "- " + markdown_text(f"{row['name']}: {row['note']} Source: {row['source']}") for row in published.values()
    )
    origin = (
        f"{markdown_code(results['command'])} on {counted(results['num_ranks'], 'rank')} of {results['device']}, "
        f"commit {results['commit']}, {results['started']}"
    )
    paragraphs = (
        f"# {markdown_text(results['name'])}",
        headline(results),
        BRACKETS,
        markdown_table(means_table(results, published)),
        notes,
        markdown_table(settings_table(results)),
        origin,
    )
    return "\n\n".join(filter(None, paragraphs)) + "\n"


# ---------------------------------------------------------------------- do two checkpoints differ
def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value (McNemar 1947, with the binomial distribution).

    Args:
        only_first, only_second: number of episodes in which only that checkpoint succeeded.

    >>> mcnemar(only_first=0, only_second=5)
    0.0625
    """
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    return min(1.0, 2 * tail)


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for multiple tests (Holm 1979).

    If no two checkpoints differ, any corrected p-value is below 0.05 in at most 5 % of comparisons.

    >>> holm([0.01, 0.5, 0.02])
    [0.03, 0.5, 0.04]
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    ascending = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for place, index in enumerate(ascending):
        num_left = len(p_values) - place
        largest = max(largest, min(1.0, num_left * p_values[index]))
        corrected[index] = largest
    return corrected


def compare(first: dict, second: dict) -> list[dict]:
    """Compare two results.json: one row per setting and temperature that both have, paired by episode id.

    Raises:
        UserError: they were run in different worlds, or have no episode in common.
    """
    check_same_world(first["world"], second["world"])
    of_second = {temperature: results["settings"] for temperature, results in by_temperature(second)}
    rows = []
    for temperature, results in by_temperature(first):
        for name, one in results["settings"].items():
            other = of_second.get(temperature, {}).get(name)
            row = None if other is None else compare_setting(one, other)
            if row is not None and row["episodes"] > 0:
                rows.append({"setting": name, "temperature": temperature} | row)
    if not rows:
        raise UserError("--compare: the two have no setting, temperature and episode in common")
    for row, p_value in zip(rows, holm([row["p"] for row in rows])):
        row |= {"p_holm": p_value, "differs": p_value < 0.05}
    return rows


def check_same_world(first: dict, second: dict) -> None:
    """Raise UserError if two evaluations were run with different settings of the simulation."""
    for key in {**first, **second}:
        one, other = first.get(key, "unknown"), second.get(key, "unknown")
        if one != other and key != "asset_dir":  # a place on one machine, which older files hold
            raise UserError(
                f"--compare: the two were evaluated with {key} {one} and {other}: evaluate one of them again"
            )


def compare_setting(one: dict, other: dict) -> dict:
    """Compare the episodes of one setting that both checkpoints ran."""
    successes = [{row["episode_id"]: bool(row["success_once"]) for row in half["outcomes"]} for half in (one, other)]
    pairs = [(successes[0][i], successes[1][i]) for i in successes[0] if i in successes[1]]
    count = len(pairs)
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    rates = [sum(pair[side] for pair in pairs) / max(count, 1) for side in (0, 1)]
    return {
        "episodes": count,
        "success_once": rates,
        "wilson_95": [list(wilson_interval(rate, max(count, 1))) for rate in rates],
        "only_first": only_first,
        "only_second": only_second,
        "p": mcnemar(only_first, only_second),
    }


def comparison_table(rows: list[dict], names: tuple[str, str]) -> list[list[str]]:
    """Header and rows. The last cell of a row says whether the two checkpoints differ."""
    header = ["setting", "sampling", "episodes", f"{names[0]} %", f"{names[1]} %", "only the first", "only the second"]
    table = [[*header, "p (McNemar)", "p (Holm)", "verdict"]]
    for row in rows:
        first_rate, second_rate = row["success_once"]
        better = names[1] if second_rate > first_rate else names[0]
        table.append(
            [
                row["setting"],
                temperature_name(row["temperature"]),
                str(row["episodes"]),
                *(percent(rate) for rate in row["success_once"]),
                str(row["only_first"]),
                str(row["only_second"]),
                f"{row['p']:.3g}",
                f"{row['p_holm']:.3g}",
                f"{better} is better" if row["differs"] else "no difference shown",
            ]
        )
    return table
